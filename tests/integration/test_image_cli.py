"""Pictures, experts and parts on the command line, from the words that are typed to the files that appear."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

import ditkit
from ditkit import media
from ditkit.state import State

SIZE = ("--width", 32, "--height", 32, "--frames", 5, "--size-from", "request")
SMALL = (*SIZE, "--steps", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cache(lambda task: tiny.write(tmp_path_factory.mktemp("cli") / task, task, "native"))


@pytest.fixture
def red(tmp_path) -> Path:
    """A red square on dark grey, taller than wide."""
    pixels = np.full((64, 48, 3), 40, np.uint8)
    pixels[20:40, 14:34] = (220, 30, 30)
    Image.fromarray(pixels).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def rows(text: str) -> dict[str, list[str]]:
    """First word of each line -> the others."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}


# --- the model that comes with the package


def test_a_picture_begins_the_clip(call, red, tmp_path):
    said = call("generate", "moving left", "--model", "shapes-i2v", "--image", red, "--steps", 3, "--out", "a.npz")
    assert said.code == 0, said.err
    assert "encode_image: " in said.out
    assert "encode_condition: " in said.out
    assert said.out.splitlines()[-2:] == ["clip   a.npz", "sheet  a-sheet.png"]
    found = media.read_manifest(tmp_path / "a.npz")
    expected = ditkit.load("shapes-i2v")("moving left", image=red, steps=3)
    assert found["output_sha256"] == expected.manifests[0]["output_sha256"]
    assert found["request"]["image"] == str(red)
    replayed = call("replay", "a.npz", "--picture", f"image={red}")
    assert replayed.code == 0, replayed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "shapes", "--image", "red.png"], "its model takes text alone. Leave image out."),
        (["--model", "shapes-i2v"], "without image: its model goes on from image. Give image=FILE."),
        (["--model", "shapes-i2v", "--image", "nope.png"], "nope.png: there is no such file. Check the path."),
        (["--model", "shapes-i2v", "--image", "."], "that is a folder. Check the path."),
        (["--model", "shapes-i2v", "--image", "words.png"], "words.png: it is not a picture of a known format."),
        (["--model", "shapes-i2v", "--image", "cut.png"], "cut.png: it is damaged"),
        (["--model", "shapes-i2v", "--image", "red.png", "--last-image", "nope.png"], "there is no such file"),
        (["--model", "shapes-i2v", "--image", "red.png", "--control-video", "a.mp4"], "takes image, last_image."),
        (["--model", "shapes-i2v", "--image", "red.png", "--size-from", "picture"], "Give image for the image's"),
        (["--model", "shapes-i2v", "--image", "red.png", "--boundary", "0.5"], "this model has one transformer."),
    ],
)
@pytest.mark.parametrize("command", ["generate", "plan"])
def test_a_wrong_picture_is_one_sentence(call, red, tmp_path, command, words, said):
    (tmp_path / "words.png").write_text("this is no picture")
    (tmp_path / "cut.png").write_bytes(red.read_bytes()[:90])
    found = call(command, "moving left", *words)
    assert found.code == 2
    assert said in found.err
    assert found.err.count("\n") == 1
    assert "loaded" not in found.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.png", "red.png", "words.png"]


# --- a plan


def test_a_plan_shows_the_expert_of_each_step(call, folder):
    said = call("plan", "blue", "--model", folder("t2v_a14b"), *SIZE, "--steps", 6)
    assert said.code == 0, said.err
    heading, *lines = [line.split() for line in said.out[said.out.index("\nSteps") :].splitlines()[2:] if line]
    assert heading == ["i", "timestep", "sigma", "guidance", "expert"]
    assert [line[0] for line in lines] == [str(i) for i in range(6)]
    for _, timestep, _, guidance, expert in lines:
        assert (guidance, expert) == (("4", "transformer") if float(timestep) >= 875 else ("3", "transformer_2"))
    assert {line[-1] for line in lines} == {"transformer", "transformer_2"}
    assert "transformer_2" in rows(said.out)
    moved = call("plan", "blue", "--model", folder("t2v_a14b"), *SIZE, "--boundary", 0, "--guidance-scale-2", 9)
    assert "transformer_2  " not in moved.out[moved.out.index("\nSteps") :]
    assert rows(moved.out)["boundary"][:1] == ["0.0"]


def test_a_plan_shows_the_size_that_follows_from_the_picture(call, folder, red):
    area = ("--width", 64, "--height", 64, "--frames", 5)
    said = call("plan", "blue", "--model", folder("i2v"), "--image", red, *area)
    assert said.code == 0, said.err
    found = rows(said.out)
    assert (found["width"][0], found["height"][0]) == ("48", "64")
    assert found["width"][1:] == ["image", str(red)]
    asked = rows(call("plan", "blue", "--model", folder("i2v"), "--image", red, *area, "--size-from", "request").out)
    assert (asked["width"][0], asked["height"][0]) == ("64", "64")


# --- runs in pieces, and models in pieces


@pytest.mark.parametrize("task", ["i2v", "i2v_a14b", "ti2v"])
def test_a_run_with_a_picture_goes_on_without_it(call, folder, red, tmp_path, task):
    """The State holds the pixels: the file may be gone."""
    words = ("blue", "--model", folder(task), "--image", red, *SMALL)
    whole = call("generate", *words, "--json", "--no-sheet", "--out", "a.npz")
    assert whole.code == 0, whole.err
    first = call("run", *words, "--stop-at-step", 1, "--save-state", "s.st", "--quiet")
    assert first.code == 0, first.err
    assert State.load(tmp_path / "s.st")["image"].shape == (1, 64, 48, 3)
    red.unlink()
    rest = call("run", "--from", "s.st", "--json", "--no-sheet", "--out", "b.npz")
    assert rest.code == 0, rest.err
    assert json.loads(rest.out)["output_sha256"] == json.loads(whole.out)["output_sha256"]


def test_another_picture_cannot_be_slipped_in(call, folder, red):
    call("run", "blue", "--model", folder("i2v"), "--image", red, *SMALL, "--stop-at-step", 1, "--save-state", "s.st")
    said = call("run", "--from", "s.st", "--image", red)
    assert said.code == 2
    assert "--image with --from s.st: a State goes on with the request that it was begun with" in said.err


def test_parts_from_elsewhere(call, folder, red, tmp_path):
    """A part that is named stands in for the model's own; which it was stands in the clip's manifest."""
    other = tmp_path / "other_vae.safetensors"
    save_file({name: t * 1.5 if t.ndim > 3 else t for name, t in tiny.vae().state_dict().items()}, other)
    words = ("blue", "--model", folder("i2v"), "--image", red, *SMALL, "--no-sheet", "--json")
    own = call("generate", *words, "--out", "a.npz")
    same = call("generate", *words, "--out", "b.npz", "--components", f"vae={folder('i2v') / 'Wan2.1_VAE.pth'}")
    changed = call("generate", *words, "--out", "c.npz", "--components", f"vae={other}")
    assert [said.code for said in (own, same, changed)] == [0, 0, 0], changed.err
    hashes = [json.loads(said.out)["output_sha256"] for said in (own, same, changed)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert "other_vae.safetensors" in json.dumps(media.read_manifest(tmp_path / "c.npz")["components"]["vae"])


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("vae=nope.pth", "there is nothing of that name"),
        ("vea=red.png", "vae"),
        ("vae", "="),
        ("vae=red.png", "red.png"),
    ],
)
def test_parts_that_are_none(call, folder, red, part, said):
    found = call("generate", "blue", "--model", folder("i2v"), "--image", red, *SMALL, "--components", part)
    assert found.code == 2
    assert said in found.err
    assert found.err.count("\n") == 1


def test_loras(call, folder, red, tmp_path):
    """A strength of 0 is none at all; with two experts it has to be said which one a file is for."""
    rank, dim = 2, tiny.TRANSFORMER.dim
    factors = np.random.default_rng(0).normal(size=(2, rank, dim)).astype(np.float32)
    save_file(
        {
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.from_numpy(factors[0]).contiguous(),
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.from_numpy(factors[1].T.copy()),
        },
        tmp_path / "lora.safetensors",
    )
    words = ("blue", "--model", folder("i2v"), "--image", red, *SMALL, "--no-sheet", "--json")

    def run(name, *more):
        said = call("generate", *words, "--out", f"{name}.npz", *more)
        assert said.code == 0, said.err
        return json.loads(said.out)["output_sha256"]

    plain = run("plain")
    assert run("none", "--loras", "lora.safetensors:0") == plain
    assert run("some", "--loras", "lora.safetensors:0.8") != plain
    clip = media.read_manifest(tmp_path / "some.npz")["components"]["transformer"]
    assert [(x["file"], x["strength"], x["tensors"]) for x in clip["loras"]] == [("lora.safetensors", 0.8, 1)]

    two = ("generate", "blue", "--model", folder("i2v_a14b"), "--image", red, *SMALL, "--no-sheet", "--quiet")
    unsaid = call(*two, "--loras", "lora.safetensors")
    assert unsaid.code == 2
    assert "Write transformer=FILE (high noise), transformer_2=FILE (low noise) or both=FILE" in unsaid.err
    said = call(*two, "--loras", "transformer_2=lora.safetensors:0.5", "--out", "b.npz")
    assert said.code == 0, said.err


def test_the_control_of_vace(call, folder, red, tmp_path):
    words = ("blue", "--model", folder("vace"), *SMALL, "--no-sheet", "--json")
    made = call("generate", *words, "--out", "control.mp4")
    assert made.code == 0, made.err
    hashes = []
    mask = Image.fromarray(np.tile(np.repeat([0, 255], 16).astype(np.uint8), (32, 1)))
    mask.save(tmp_path / "mask.png")
    steered = ("--control-video", "control.mp4")
    shown = ("--reference-images", red)
    for more in (
        (), steered, (*steered, "--control-mask", "mask.png"), (*steered, "--control-scale", 0.5), shown,
        (*shown, "--reference-images", "mask.png"),
    ):  # fmt: skip
        said = call("generate", *words, "--out", "x.npz", *more)
        assert said.code == 0, said.err
        hashes += json.loads(said.out)["output_sha256"]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--control-mask", "red.png"), "a control mask without a control video: there is nothing to be kept."),
        (("--control-video", "long.mp4"), "control_video of 9 frames: the run makes 5."),
        (("--control-video", "right.mp4", "--control-mask", "long.mp4"), "control_mask of 9 frames: the run makes 5."),
        (("--control-video", "red.png"), "its format is not known"),
        (
            ("--control-scale", "-1"),
            "(flag --control-scale): input should be greater than or equal to 0.",
        ),
        (("--reference-images", "nope.png"), "nope.png: there is no such file"),
    ],
)
def test_a_wrong_control_is_one_sentence_before_anything_is_loaded(call, folder, red, tmp_path, words, said):
    for name, frames in (("long", 9), ("right", 5)):
        pixels = np.random.default_rng(0).integers(0, 256, (frames, 32, 32, 3)).astype(np.uint8)
        media.write_video(tmp_path / f"{name}.mp4", pixels, 8, {})
    found = call("generate", "blue", "--model", folder("vace"), *SMALL, *words)
    assert found.code == 2
    assert said in found.err
    assert found.err.count("\n") == 1
    assert not re.search("loaded|encode_text", found.out)

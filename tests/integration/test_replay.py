"""Replay: the same clip again, bit for bit, or a plain word about what is different."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ditkit import media, replay
from ditkit.errors import StateError
from ditkit.receipt import versions

PROMPT = "a red circle"


@pytest.fixture
def mine(model, tmp_path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "mine"))


@pytest.fixture
def clip(call, mine, tmp_path) -> Path:
    words = ["--model", mine, "--seed", 3, "--steps", 2, "--out", "clips/a.npz", "--no-sheet", "--quiet"]
    assert call("generate", PROMPT, *words).code == 0
    return tmp_path / "clips/a.npz"


def edit(clip: Path, change) -> Path:
    """The clip's sidecar with another manifest."""
    sidecar = clip.with_suffix(".json")
    card = json.loads(sidecar.read_text())
    change(card["manifest"])
    sidecar.write_text(json.dumps(card))
    return sidecar


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".npz"])
def test_every_format_replays(call, model, tmp_path, suffix):
    made = call("generate", PROMPT, "--model", model, "--out", f"a{suffix}", "--no-sheet", "--json")
    assert made.code == 0, made.err
    for name in (f"a{suffix}", "a.json"):
        said = call("replay", name, "--out", "b.npz", "--quiet")
        assert (said.code, said.err) == (0, "")
        assert said.out.splitlines() == ["clip   b.npz", f"identical: {name} was made again, bit for bit"]
        assert media.read_manifest(tmp_path / "b.npz")["output_sha256"] == json.loads(made.out)["output_sha256"][0]


def test_in_python(clip):
    script = replay.read(clip)
    assert (script.request.seed, script.request.steps) == (3, 2)
    replayed = replay.replay(script)
    assert replayed.identical
    np.testing.assert_array_equal(replayed.result.video, media.read_video(clip)[0])


def test_a_clip_of_a_resumed_run_replays(call, mine, tmp_path):
    call("run", PROMPT, "--model", mine, "--stop-at-step", 2, "--save-state", "s.st")
    call("run", "--from", "s.st", "--out", "a.npz", "--no-sheet")
    assert call("replay", "a.npz").code == 0


@pytest.mark.parametrize("batched", [True, False])
def test_each_clip_of_several_replays(call, mine, tmp_path, batched):
    switch = "--batched" if batched else "--no-batched"
    words = ["--model", mine, "--seed", 1, "--seed", 2, "--seed", 3, switch, "--out", "x.npz", "--no-sheet"]
    assert call("generate", PROMPT, *words).code == 0
    for i in range(3):
        assert media.read_manifest(tmp_path / f"x-{i}.npz")["clip"] == (i if batched else 0)
        said = call("replay", f"x-{i}.npz", "--out", "y.npz", "--quiet")
        assert said.code == 0, said.out
        np.testing.assert_array_equal(
            media.read_video(tmp_path / "y.npz")[0], media.read_video(tmp_path / f"x-{i}.npz")[0]
        )


# ---- what was changed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
def test_other_weights(call, clip, mine, component):
    (file,) = (mine / component).glob("*.safetensors")
    tensors = load_file(file)
    tensors[sorted(tensors)[0]].view(-1)[0].add_(1e-3)
    save_file(tensors, file)
    said = call("replay", clip)
    assert said.code == 2
    assert f"the {component} of " in said.err
    assert f"the sha256 of {file.name} is" in said.err
    assert "the clip was made with" in said.err
    assert said.out == "", "found before any compute"


def test_another_tokenizer_and_a_missing_file(call, clip, mine):
    file = mine / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    assert "the sha256 of tokenizer.json is" in call("replay", clip).err
    file.unlink()
    said = call("replay", clip)
    assert said.code == 2
    assert "there is no tokenizer.json" in said.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["request"].update(seed=4), ["the frames hash to"]),
        (lambda m: m["request"].update(steps=3), ["the noise levels are others", "the frames hash to"]),
        (lambda m: m["request"].update(prompt="a blue square"), ["the frames hash to"]),
        (lambda m: m["sigmas"].__setitem__(1, 0.5), ["the noise levels are others"]),
        (lambda m: m.update(output_sha256="0" * 64), ["recorded is 0000000000000000"]),
    ],
)
def test_another_manifest_gives_another_clip(call, clip, change, words):
    said = call("replay", edit(clip, change), "--quiet")
    assert said.code == 1
    assert said.out.startswith(f"different: {clip.with_suffix('.json')} was not made again\n")
    for word in words:
        assert word in said.out


def test_the_difference_is_told_in_pixels(call, mine, tmp_path, clip):
    """A clip that carries the manifest of another."""
    video, fps = media.read_video(clip)
    changed = video.copy()
    changed[1, :16, :, 0] ^= 7
    manifest = dict(media.read_manifest(clip))
    media.write_video(tmp_path / "b.npz", changed, fps, manifest)
    said = call("replay", "b.npz", "--quiet")
    assert said.code == 1
    assert "the frames in the file are not those that its manifest speaks of" in said.out
    media.write_video(tmp_path / "c.npz", changed, fps, {**manifest, "output_sha256": media.frames_sha256(changed)})
    said = call("replay", "c.npz", "--quiet")
    assert said.code == 1
    assert f"1 of 5 frames and {0.5 / 5:.1%} of the pixels differ" in said.out
    assert "7 at most" in said.out


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m.update(manifest=2), "version 2"),
        (lambda m: m.pop("manifest"), "version None"),
        (lambda m: m.pop("setup"), "no usable 'setup'"),
        (lambda m: m.update(sigmas="many"), "no usable 'sigmas'"),
        (lambda m: m["request"].update(stpes=3), "did you mean 'steps'"),
        (lambda m: m["request"].update(steps=0), "greater than or equal to 1"),
        (lambda m: m["setup"].update(dtype="float31"), "dtype='float31'"),
        (lambda m: m["setup"].update(model="nowhere"), "model 'nowhere'"),
        (lambda m: m.update(clip=1), "clip 1 of a run that makes 1"),
        (lambda m: m["components"]["transformer"].update(device="cuda:77"), "device='cuda:77'"),
        (lambda m: m["seams"].update(swaps=["lora"]), "changed by lora"),
        (lambda m: m["components"]["transformer"].pop("files"), "no usable"),
        (lambda m: m["components"].update(transformer=3), "no usable"),
        (lambda m: m["components"].update({"../../x": {"files": {"y": "z"}}}), "no usable"),
        (lambda m: m["machine"].update(threads="all"), "no usable"),
    ],
)
def test_a_manifest_that_cannot_be_followed(call, clip, change, word):
    said = call("replay", edit(clip, change))
    assert said.code == 2, said.out
    assert word in said.err
    assert len(said.err.splitlines()) == 1


def test_a_file_without_a_manifest(call, tmp_path):
    media.write_video(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
    said = call("replay", "a.mp4")
    assert said.code == 2
    assert "carries none" in said.err
    (tmp_path / "b.json").write_text("{}")
    assert call("replay", "b.json").code == 2


# ---- where it ran -------------------------------------------------------------------------------------------------


def test_other_versions_are_a_note(call, clip):
    said = call(
        "replay", edit(clip, lambda m: (m["machine"]["versions"].update(torch="1.0"), m["machine"].update(gpu="H0")))
    )
    assert said.code == 0
    assert f"note: torch is {versions()['torch']}, it was 1.0" in said.err
    assert "note: the gpu is None, it was H0" in said.err


def test_the_recorded_threads_dtypes_and_devices_are_used(clip, mine):
    seen = []
    sidecar = edit(clip, lambda m: m["machine"].update(threads=2))
    script = replay.read(sidecar)
    before = torch.get_num_threads()
    replay.replay(script, listeners=[lambda e: seen.append(torch.get_num_threads())])
    assert set(seen) == {2}
    assert torch.get_num_threads() == before
    setup = replay.prepare(script).setup
    assert setup.dtypes == {"text_encoder": "float32", "transformer": "float32", "vae": "float32"}
    assert set(setup.devices.values()) == {"cpu"}


def test_a_run_with_its_own_threads_replays(call, mine, tmp_path):
    before = torch.get_num_threads()
    try:
        assert call("generate", PROMPT, "--model", mine, "--threads", 2, "--out", "a.npz", "--no-sheet").code == 0
    finally:
        torch.set_num_threads(before)
    assert media.read_manifest(tmp_path / "a.npz")["machine"]["threads"] == 2
    assert call("replay", "a.npz").code == 0
    assert torch.get_num_threads() == before


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StateError, match="no such file"):
        replay.read(tmp_path / "nowhere.mp4")


def test_from_another_folder(call, mine, tmp_path, monkeypatch):
    """The clip names its model by a whole path, though it was typed relative to a folder."""
    assert call("generate", PROMPT, "--model", "mine", "--out", "a.npz", "--no-sheet", "--quiet").code == 0
    assert media.read_manifest(tmp_path / "a.npz")["setup"]["model"] == str(mine.resolve())
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert call("replay", "../a.npz", "--quiet").code == 0


def test_of_a_model_that_was_moved(call, clip, mine, tmp_path):
    mine.rename(tmp_path / "moved")
    said = call("replay", clip, "--quiet")
    assert (said.code, "with --model" in said.err) == (2, True)
    assert call("replay", clip, "--quiet", "--model", "moved").code == 0
    said = call("replay", clip, "--quiet", "--model", "shapes")
    assert said.code == 2, "its weights are others"
    assert "the clip was made with" in said.err


def test_a_tilde_that_the_shell_did_not_see(call, mine, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text('model = "~/mine"\n')
    words = ["--out", "~/a.npz", "--sheet", "~/b.png", "--quiet"]
    assert call("run", PROMPT, "--config", "~/c.toml", "--save-state", "~/s.st", *words).code == 0
    assert call("run", "--from", "~/s.st", "--model=~/mine", *words).code == 0
    monkeypatch.setenv("DITKIT_MODEL", "~/mine")
    assert call("generate", PROMPT, *words).code == 0
    assert call("replay", "~/a.npz", "--model=~/mine", "--out", "~/c.npz", "--quiet").code == 0
    assert call("stages", "--model", "~/mine").code == 0
    assert {"a.npz", "b.png", "c.npz", "s.st"} <= {p.name for p in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()

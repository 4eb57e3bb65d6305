"""Bad input through the real command line: one sentence, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shell import alone

import ditkit
from ditkit.errors import RequestError

PROMPT = "a red circle"


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check(said, *words: str, code: int = 2) -> None:
    """One line on stderr, exit code ``code``, no output beyond what was shown before the fault."""
    assert said.code == code, said.err
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(".")
    for word in words:
        assert word in lines[0], lines[0]


# ---- requests and setups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "run", "plan"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x", "--steps", "0"], ["steps=0 (flag --steps)", "greater than or equal to 1"]),
        (["x", "--steps", "two"], ["steps='two' (flag --steps)", "valid integer"]),
        (["x", "--width", "40"], ["width=40", "multiples of 16", "32 or 48"]),
        (["x", "--height", "0"], ["height=0 (flag --height)", "greater than or equal to 1"]),
        (["x", "--frames", "6"], ["frames=6", "4n + 1", "5 or 9"]),
        (["x", "--guidance-scale", "-1"], ["guidance_scale=-1 (flag --guidance-scale)", "equal to 0"]),
        (["x", "--guidance-scale", "nan"], ["guidance_scale=nan", "finite"]),
        (["x", "--guidance-scale", "inf"], ["guidance_scale=inf", "finite"]),
        (["x", "--seed", "-2"], ["seed=-2", "equal to 0"]),
        (["x", "--scheduler", "unicp"], ["scheduler 'unicp'", "did you mean 'unipc'"]),
        (["x", "--scheduler-options", "ordre=2"], ["option 'ordre'", "did you mean 'order'"]),
        (["x", "--scheduler-options", "ordre"], ["--scheduler-options ordre", "NAME=VALUE"]),
        (["x", "--set", "stpes=4"], ["--set stpes", "did you mean 'steps'"]),
        (["x", "--set", "steps"], ["--set steps", "KEY=VALUE"]),
        (["x", "--set", "steps=4", "--steps", "5"], ["--set steps", "given before, by flag --steps"]),
        (["x", "--steps", "4", "--steps", "5"], ["given before"]),
        (["x", "--seed", "1", "--seed", "2", "--set", "seed=3"], ["given twice"]),
        (["x", "--sigmas", "[0.5, 1.0]"], ["sigmas", "fall"]),
        (["x", "--steps", "20", "--sigmas", "[1, 0.5]"], ["flag --steps with flag --sigmas", "Leave out steps, or"]),
        (["x", "--shift", "3", "--set", "sigmas=[1, 0.5]"], ["flag --shift with --set sigmas", "Leave out shift"]),
        (["x", "--stpes", "4"], ["No such option", "--stpes"]),
        (["x", "y"], ["unexpected extra argument"]),
        (["x", "--steps"], ["requires an argument"]),
        (["x", "--device", "cuda:77"], ["device='cuda:77'", "this machine has"]),
        (["x", "--dtype", "float31"], ["dtype='float31'", "bfloat16"]),
        (["x", "--set", "devices.ave=cpu"], ["no component 'ave'"]),
        (["x", "--config", "nowhere.toml"], ["config file nowhere.toml", "no such file"]),
        (["x", "--config", "wrong.toml"], ["steps='many' (config file wrong.toml)", "valid integer"]),
        (["x", "--config", "unknown.toml"], ["config file unknown.toml: stpes", "did you mean 'steps'"]),
        ([""], ["empty prompt"]),
        (["  \n"], ["empty prompt"]),
        ([], ["empty prompt"]),
    ],
)
def test_a_wrong_request_or_setup(call, model, tmp_path, command, words, expected):
    (tmp_path / "wrong.toml").write_text("steps = 'many'\n")
    (tmp_path / "unknown.toml").write_text("stpes = 4\n")
    before = left_in(tmp_path)
    check(call(command, "--model", model, *words), *expected)
    assert left_in(tmp_path) == before


def test_unknown_environment(call, model, monkeypatch):
    monkeypatch.setenv("DITKIT_STPES", "4")
    check(call("generate", PROMPT, "--model", model), "environment DITKIT_STPES", "did you mean 'steps'")


def test_unknown_default_of_a_model(call, model, tmp_path):
    mine = copy(model, tmp_path)
    (mine / "ditkit.toml").write_text("[defaults]\nstpes = 4\n")
    check(call("generate", PROMPT, "--model", mine), f"stpes=4 ({mine / 'ditkit.toml'})", "did you mean 'steps'")
    (mine / "ditkit.toml").write_text("[defaults]\nsteps = 'many'\n")
    check(call("generate", PROMPT, "--model", mine), f"steps='many' ({mine / 'ditkit.toml'})", "valid integer")


def test_an_empty_prompt_in_python_and_an_empty_negative_prompt(model):
    pipe = ditkit.load(model)
    for prompt in ("", " \n", ["a", ""]):
        with pytest.raises(RequestError, match="empty prompt"):
            pipe(prompt)
    assert pipe(PROMPT, negative_prompt="", steps=1).video.shape == (5, 32, 32, 3)


@pytest.mark.parametrize("words", [["foo"], ["config", "explain", "stpes"], ["stages", "--model", "nowhere"],
                                   ["generate", PROMPT, "--model", "nowhere"], ["replay", "nowhere.mp4"],
                                   ["run", "--from", "nowhere.st"], ["run", PROMPT, "--start", "denoise"]])  # fmt: skip
def test_other_mistakes(call, words):
    check(call(*words))


# ---- a model's files ----------------------------------------------------------------------------------------------


def copy(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to / "mine"))


def change(file: Path, edit) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "missing file": (Path.unlink, "no .safetensors file"),
    "missing tensor": (lambda f: change(f, lambda t: t.pop(sorted(t)[0])), ""),
    "extra tensor": (lambda f: change(f, lambda t: t.update(odd=torch.zeros(2))), "odd"),
    "mis-shaped tensor": (lambda f: change(f, lambda t: t.update({sorted(t)[0]: torch.zeros(3, 5, 7)})), "[3, 5, 7]"),
    "truncated file": (truncate, ""),
    "garbage": (lambda f: f.write_bytes(b"\xff" * 1000), ""),
}


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(call, model, tmp_path, component, damage):
    mine = copy(model, tmp_path)
    (file,) = (mine / component).glob("*.safetensors")
    damager, word = DAMAGES[damage]
    damager(file)
    before = left_in(tmp_path)
    said = call("generate", PROMPT, "--model", mine, "--out", "a.npz", "--quiet")
    check(said, f"/{component}", word)
    assert left_in(tmp_path) == before


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae", "tokenizer"])
def test_a_component_is_missing(call, model, tmp_path, component):
    mine = copy(model, tmp_path)
    shutil.rmtree(mine / component)
    check(call("generate", PROMPT, "--model", mine, "--quiet"), component)
    assert not [name for name in left_in(tmp_path) if name.endswith((".mp4", ".json.part", ".part"))]


# ---- States -------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(call, model, tmp_path) -> Path:
    assert call("run", PROMPT, "--model", model, "--stop-at-step", 2, "--save-state", "s.st", "--quiet").code == 0
    return tmp_path / "s.st"


def rewrite(file: Path, edit) -> None:
    """The same file with another description."""
    with safe_open(file, "pt") as f:
        header = json.loads(f.metadata()["ditkit.state"])
    tensors = load_file(file)
    edit(header)
    save_file(tensors, file, {"ditkit.state": json.dumps(header)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: rewrite(f, lambda h: h.update(schema=99)), ["State version 99", "reads version 1"]),
        (lambda f: rewrite(f, lambda h: h.pop("schema")), ["damaged"]),
        (lambda f: rewrite(f, lambda h: h.pop("plain")), ["damaged"]),
        (lambda f: rewrite(f, lambda h: h["plain"].pop("request")), ["holds no request"]),
        (lambda f: rewrite(f, lambda h: h["plain"]["model"].update(name="nowhere")), ["model 'nowhere'"]),
        (lambda f: rewrite(f, lambda h: h["plain"]["model"]["parts"].update(transformer="x")), ["another transformer"]),
        (lambda f: rewrite(f, lambda h: h["plain"]["weights"].update(transformer="x")), ["another transformer"]),
        (lambda f: f.write_bytes(f.read_bytes()[:-10]), ["not a complete safetensors file"]),
        (lambda f: f.write_bytes(b""), ["not a complete safetensors file"]),
        (lambda f: f.write_bytes(struct.pack("<Q", 10**15) + b"{}"), ["not a complete safetensors file"]),
        (lambda f: save_file({"a": torch.zeros(1)}, f), ["without a ditkit State"]),
        (lambda f: (f.unlink(), f.mkdir()), ["s.st"]),
    ],
)  # fmt: skip
def test_a_state_that_cannot_be_used(call, state, tmp_path, damage, words):
    damage(state)
    check(call("run", "--from", "s.st", "--out", "a.npz", "--quiet"), *words)
    assert left_in(tmp_path) == ["s.st"]


def test_a_state_with_another_model_or_other_weights(call, state, model, tmp_path):
    mine = copy(model, tmp_path)
    (file,) = (mine / "transformer").glob("*.safetensors")
    change(file, lambda t: t[sorted(t)[0]].add_(1))
    check(call("run", "--from", "s.st", "--model", mine, "--quiet"), "begun with another model")
    config = json.loads((mine / "vae" / "config.json").read_text())
    (mine / "vae" / "config.json").write_text(json.dumps({**config, "z_dim": 8}))
    check(call("run", "--from", "s.st", "--model", mine, "--quiet"), "latents_mean has 16 values where z_dim is 8")
    check(call("run", "--from", "s.st", "--dtype", "float64", "--quiet"), "begun with another transformer")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steps", "4"], ["--steps with --from s.st", "request that it was begun with"]),
        (["--set", "seed=4"], ["--seed with --from s.st"]),
        (["a prompt"], ["PROMPT with --from s.st"]),
        (["--config", "c.toml"], ["steps=9 (config file c.toml) with --from s.st", "begun with 4"]),
        (["--stop-at-step", "2", "--save-state", "t.st"], ["--stop-at-step 2", "2 steps behind it"]),
        (["--stop-at-step", "9", "--save-state", "t.st"], ["--stop-at-step 9", "has 4 steps"]),
        (["--stop-at-step", "3"], ["leave nothing behind", "--save-state"]),
        (["--until", "denoise"], ["leave nothing behind", "--save-state"]),
        (["--until", "denose"], ["stage 'denose'", "did you mean 'denoise'"]),
        (["--start", "decode_latents", "--until", "denoise", "--save-state", "t.st"], ["first comes after the last"]),
        (["--until", "encode_text", "--stop-at-step", "3", "--save-state", "t.st"], ["before it takes a step"]),
        (["--sheet", "a.png", "--no-sheet"], ["contradict"]),
    ],
)
def test_a_state_with_the_wrong_words(call, state, tmp_path, words, expected):
    (tmp_path / "c.toml").write_text("steps = 9\n")
    check(call("run", "--from", "s.st", *words), *expected)
    assert left_in(tmp_path) == ["c.toml", "s.st"]


def test_a_config_file_that_agrees_with_the_state_may_stay(call, state, model, tmp_path):
    (tmp_path / "c.toml").write_text(f"model = {json.dumps(str(model))}\nsteps = 4\nthreads = 1\n")
    assert (
        call("run", "--from", "s.st", "--config", "c.toml", "--out", "a.npz", "--no-sheet", "--quiet").out == "a.npz\n"
    )


# ---- places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out", "folder.npz"], ["folder.npz", "it is a folder"]),
        (["--out", "file/a.mp4"], ["file/a.mp4", "file exists"]),
        (["--out", "/proc/nowhere/a.mp4"], ["/proc/nowhere/a.mp4"]),
        (["--out", "a.avi"], [".avi", "no known format"]),
        (["--out", "a"], ["without suffix"]),
        (["--out", "x" * 300 + ".mp4"], ["bytes, and 255 are the most"]),
        (["--out", "a.mp4", "--sheet", "folder.png"], ["folder.png", "folder"]),
        (["--out", "a.mp4", "--sheet", "a.jpg"], ["a.jpg", ".png"]),
        (["--out", "a.mp4", "--sheet", "file/a.png"], ["file/a.png", "file exists"]),
        (["--out", "a.mp4", "--save-state", "folder.png"], ["folder.png", "folder"]),
        (["--out", "a.mp4", "--save-state", "file/s.st"], ["file/s.st", "file exists"]),
    ],
)
def test_places_that_cannot_be_written_are_found_before_any_compute(call, model, tmp_path, words, expected):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = left_in(tmp_path)
    said = call("run", PROMPT, "--model", model, *words)
    check(said, *expected)
    assert said.out == "", "not even the step table"
    assert left_in(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ours(call, model, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    check(call("generate", PROMPT, "--model", model, "--out", "closed/a.mp4"), "permission denied")


# ---- full disks ---------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int):
    """Writes beyond ``size`` bytes of a file fail, as on a disk that has just filled up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BIG = ("--width", 256, "--height", 256, "--steps", 1, "--no-sheet")


@pytest.mark.parametrize("out", ["a.npz", "a.mp4"])
def test_a_video_that_does_not_fit(call, model, tmp_path, out):
    with largest_file(70_000):  # the first block still fits
        said = call("generate", PROMPT, "--model", model, *BIG, "--out", out, "--quiet")
    assert said.code == 2
    note, error = said.err.splitlines()
    assert note.startswith("note: what was computed could not be kept (saving the State to a.state.safetensors")
    assert f"writing {out}: file too large" in error
    assert left_in(tmp_path) == []


def test_a_state_that_does_not_fit(call, model, tmp_path):
    with largest_file(70_000):
        said = call("run", PROMPT, "--model", model, *BIG, "--save-state", "s.st", "--out", "a.npz", "--quiet")
    assert said.code == 2
    assert "error: saving the State to s.st: File too large" in said.err.splitlines()[-1]
    assert left_in(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or os.geteuid() != 0:
        pytest.skip("only root can mount a disk to fill")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=80k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a disk to fill")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("words", [["--out", "disk/a.npz"], ["--out", "a.npz", "--save-state", "disk/s.st"]])
def test_a_full_disk(call, model, tmp_path, tiny_disk, monkeypatch, words):
    """What was computed is kept where there is room."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    said = call("run", PROMPT, "--model", model, *BIG, *words, "--quiet")
    assert said.code == 2
    assert left_in(tiny_disk) == []
    note, command, error = said.err.splitlines()
    assert re.search(r"error: .*disk/.*o space left on device", error)
    assert str(tmp_path / "tmp") in note
    again = [word.replace("disk/", "") for word in shlex.split(command)[1:]]
    assert call(*again, "--quiet").code == 0
    assert (tmp_path / "a.npz").exists()


# ---- real processes -----------------------------------------------------------------------------------------------


def shell(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ditkit", *words], cwd=cwd, capture_output=True, text=True, env=alone()
    )


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["generate", "x", "--steps", "0"], "steps=0"),
        (["generate", PROMPT, "--nonsense", "1"], "--nonsense"),
        (["run", "--from", "nowhere.st"], "nowhere.st"),
    ],
)
def test_exit_codes_of_real_processes(model, tmp_path, words, word):
    done = shell(*words, "--model", str(model), cwd=tmp_path)
    assert done.returncode == 2
    assert word in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out", "a.npz", "--save-state", "a.npz"], ["State a.npz", "the clip goes there too"]),
        (["--out", "a.npz", "--save-state", "./b/../a.json"], ["a.json", "the clip's manifest goes there too"]),
        (
            ["--out", "a.npz", "--sheet", "b.png", "--save-state", "b.png"],
            ["the contact sheet goes"],
        ),
        (["--out", "a.png", "--save-state", "a/s.st"], ["a/s.st", "replace the folder a"]),
    ],
)
def test_two_results_in_one_place(call, model, tmp_path, words, expected):
    check(call("run", PROMPT, "--model", model, *words), *expected)
    assert left_in(tmp_path) == []


def test_the_manifest_of_a_clip_of_the_same_name_stays(call, model, tmp_path):
    words = ["generate", PROMPT, "--model", model, "--no-sheet", "--quiet", "--out"]
    assert call(*words, "x.npz").code == 0
    before = (tmp_path / "x.json").read_bytes()
    for name in ("x.gif", "x.png"):
        check(call(*words, name), f"writing {name}", "x.json", "that of x.npz")
    assert left_in(tmp_path) == ["x.json", "x.npz"]
    assert (tmp_path / "x.json").read_bytes() == before
    assert call(*words, "x.npz").code == 0, "its own clip may be made again"
    (tmp_path / "x.npz").unlink()
    assert call(*words, "x.png").code == 0, "and another when that is gone"
    check(call(*words, "x.npz"), "that of x")


def test_sigmas_above_steps_replace_them_and_below_do_not(call, model, tmp_path):
    """A layer may overrule the one below it; what it says itself is never passed over."""
    words = ["plan", PROMPT, "--model", model, "--config", "c.toml"]
    (tmp_path / "c.toml").write_text("steps = 9\n")
    assert call(*words, "--sigmas", "[1, 0.5]").code == 0
    (tmp_path / "c.toml").write_text("sigmas = [1, 0.5]\n")
    check(call(*words, "--steps", "9"), "flag --steps with config file c.toml")
    assert call(*words, "--steps", "9", "--sigmas", "none").code == 0


@pytest.mark.parametrize(
    "words", [["--seed", "3"], ["--set", "prompt=x"], ["--batched"], ["--no-batched"], ["--set", "seed=[1, 2]"]]
)
def test_bench_quality_has_prompts_and_seeds_of_its_own(call, words):
    check(call("bench", "quality", "--clips", "1", *words), "with bench quality", "Leave it out")

"""The names of what is written: one that ditkit chooses replaces nothing, and one that can be no file's is refused
before anything is computed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from shell import alone

from ditkit.cli import naming, show
from ditkit.state import State

PROMPT = "a red circle"


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt(monkeypatch, error=KeyboardInterrupt) -> None:
    def listener(event):
        if event.name == "step.end":
            raise error

    monkeypatch.setattr(show, "warn_of_truncation", listener)


@pytest.mark.slow
def test_the_default_name_replaces_nothing(call, model, tmp_path, monkeypatch):
    """Nor does a State that was cut off, a sheet alone, or a card whose clip is gone."""
    words = [PROMPT, "--model", model, "-q"]
    for command in ("generate", "run", "generate"):
        before = held(tmp_path)
        said = call(command, *words, "--steps", len(before) // 3 + 1)
        assert said.code == 0, said.err
        after = held(tmp_path)
        assert {name: after[name] for name in before} == before
        assert len(after) == len(before) + 3
    names = {f"outputs/a-red-circle-0{n}{end}" for n in ("", "_2", "_3") for end in (".mp4", ".json", "-sheet.png")}
    assert held(tmp_path).keys() == names
    for file in tmp_path.glob("outputs/*_2*"):
        if file.suffix != ".png":
            file.unlink()
    with monkeypatch.context() as patch:
        interrupt(patch)
        assert call("generate", *words).code == 130
    assert (tmp_path / "outputs/a-red-circle-0_4.state.safetensors").exists()
    before = held(tmp_path)
    assert call("generate", *words, "--no-sheet").out == "outputs/a-red-circle-0_5.mp4\n"
    after = held(tmp_path)
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_several_clips_and_a_demo_replace_nothing(call, model, tmp_path):
    for command in (["generate", PROMPT, "--set", "seed=[3, 4]", "--steps", "1", "--no-sheet"], ["demo"]):
        words = [*command, "--model", model, "-q"]
        assert call(*words).code == 0
        before = held(tmp_path)
        assert call(*words).code == 0
        after = held(tmp_path)
        assert {name: after[name] for name in before} == before
        assert len(after) > len(before)
    assert {"outputs/demo.mp4", "outputs/demo_2.mp4", "outputs/a-red-circle-3_2-1.mp4"} <= after.keys()


def test_two_that_choose_at_once(tmp_path, monkeypatch):
    """Each has its own name from the moment that it begins, and a process that was killed holds none."""
    monkeypatch.chdir(tmp_path)
    wanted = Path("outputs/a-0.mp4")
    script = "import sys, pathlib\nfrom ditkit.cli.naming import free_out\n"
    script += "with free_out(pathlib.Path(sys.argv[1]), 1) as out:\n    print(out, flush=True)\n    sys.stdin.read()\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, wanted], env=alone(), text=True, **pipes) as other:
        assert other.stdout.readline().strip() == "outputs/a-0.mp4"
        with naming.free_out(wanted, 1) as second, naming.free_out(wanted, 1) as third:
            assert (second.name, third.name) == ("a-0_2.mp4", "a-0_3.mp4")
        other.kill()
    with naming.free_out(wanted, 1) as again:
        assert again == wanted
    assert list(tmp_path.iterdir()) == [] or os.listdir(tmp_path / "outputs") == []


def test_a_state_that_was_kept_is_replaced_by_a_later_one_of_the_same_run_only(call, model, tmp_path, monkeypatch):
    words = ["generate", PROMPT, "--model", model, "--no-sheet", "-q", "--out", "a.npz"]
    with monkeypatch.context() as patch:
        interrupt(patch)
        first = call(*words)
        assert call(*words, "--seed", "5").code == 130
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.state.safetensors", "a.state_2.safetensors"]
        assert State.load(tmp_path / "a.state.safetensors")["seed"] == [0]
        again = shlex.split(first.err.splitlines()[-1])[1:]
        assert call(*again).code == 130
    assert len(list(tmp_path.iterdir())) == 2
    assert State.load(tmp_path / "a.state.safetensors")["step"] == 2


def test_a_new_run_in_a_folder_with_a_clip(call, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/clip.mp4").write_bytes(b"mine")
    said = call("run", PROMPT, "--model", model, "--run", "./mine", "-q")
    assert said.code == 2
    assert "clip.mp4 is there, from before" in said.err
    assert held(tmp_path) == {"mine/clip.mp4": b"mine"}


ODD = [".", "..", "/", "", "x/", "a/..", "x" * 300 + ".mp4", "a\0b.mp4", "folder", "no-suffix", " "]


OTHERS = [(flag, name) for flag in ("--save-state", "--sheet") for name in (".", "x/", "a\0b", "y" * 256, "folder")]


@pytest.mark.parametrize(("flag", "name"), [*(("--out", name) for name in ODD), *OTHERS])
def test_a_path_that_can_be_no_file(call, model, tmp_path, flag, name):
    (tmp_path / "folder").mkdir()
    said = call("run", PROMPT, "--model", model, flag, name, "-q")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: writing ")
    assert len(said.err.splitlines()) == 1
    assert len(said.err) < 400
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


@pytest.mark.parametrize("name", ["", " ", "x" * 300, "a\0b", "x/" + "y" * 256])
@pytest.mark.parametrize("flag", ["--run", "--resume"])
def test_a_folder_that_can_be_no_run(call, model, tmp_path, name, flag):
    prompt = [PROMPT] if flag == "--run" else []
    said = call("run", *prompt, "--model", model, flag, name, "-q")
    assert (said.code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert len(said.err) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".", "..", "/", "", "x" * 300, "a\0b"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_that_convert_cannot_write(call, model, tmp_path, name, more):
    said = call("convert", model, name, "--layout", "diffusers", *more)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: writing ")
    assert len(said.err.splitlines()) == 1
    assert len(said.err) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["lock", ""], ["lock", "x" * 300], ["lock", "a\0b"], ["replay", "a\0b"],
                                   ["run", "--from", "a\0b"], ["inspect", "x" * 300], ["inspect", "a\0b"],
                                   ["generate", "a", "--model", "x" * 300], ["generate", "a", "--model", "a\0b"],
                                   ["generate", "a", "--config", "x" * 300], ["runs", "x" * 300],
                                   ["fork", "x" * 300], ["fork", "a\0b"],
                                   ["generate", "a", "--cache", ""], ["generate", "a", "--cache", "x" * 300],
                                   ["generate", "a", "--image", "a\0b"]])  # fmt: skip
def test_a_path_that_nothing_can_be_read_from(call, tmp_path, words):
    said = call(*words)
    assert said.code == 2, said.err
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("error: ")
    assert "its traceback" not in said.err
    assert list(tmp_path.iterdir()) == []

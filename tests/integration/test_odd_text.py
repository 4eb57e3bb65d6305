"""Text that is no UTF-8, from wherever it comes: refused in one sentence before anything is computed, or it works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from shell import alone

import ditkit
from ditkit.contracts import Answer
from ditkit.errors import PlaceError, SetupError, StateError
from ditkit.stages.expand_prompt import whole
from ditkit.state import State

HALF = os.fsdecode(b"caf\xe9")
ONE = ["--steps", "1", "--no-sheet", "-q"]


def refused(said, *words) -> None:
    assert (said.code, said.out) == (2, ""), said.err
    assert len(said.err.splitlines()) == 1
    assert "its traceback" not in said.err
    for word in words:
        assert word in said.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([HALF], "PROMPT"),
        (["a", "--negative-prompt", HALF], "--negative-prompt"),
        (["a", "--set", f"prompt={HALF}"], ""),
        (["a", "--image", HALF], "--image"),
        (["a", "--expand-template", HALF], "--expand-template"),
        (["a", "--expander", f"http://{HALF}/v1"], "--expander"),
        (["a", "--plug", f"{HALF}.py"], "--plug"),
        (["a", "--scheduler", HALF], "--scheduler"),
        (["a", "--set", f"devices.{HALF}=cpu"], ""),
        (["a", "--scheduler-options", f"{HALF}=1"], ""),
        (["a", "--set", f"sharpness.{HALF}=1"], ""),
        (["a", "--set", f"{HALF}=1"], ""),
        (["a", "--components", f"vae={HALF}"], ""),
        (["a", "--model", HALF], "model"),
    ],
)
def test_settings(call, model, tmp_path, words, named):
    given = words if "--model" in words else [*words, "--model", model]
    (tmp_path / HALF).mkdir()
    refused(call("run", *given, "--run", "r", *ONE), named)
    assert list(tmp_path.iterdir()) == [tmp_path / HALF]


def test_the_environment_and_a_config(call, model, tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_bytes(b'prompt = "caf\xe9"\n')
    refused(call("generate", "--config", "c.toml", "--model", model, *ONE), "c.toml")
    monkeypatch.setenv("DITKIT_PROMPT", HALF)
    refused(call("generate", "--model", model, *ONE), "environment DITKIT_PROMPT")


def test_names_of_outputs_work(call, model, tmp_path):
    assert call("generate", "a", "--model", model, "--out", f"{HALF}.mp4", *ONE).code == 0
    assert (tmp_path / f"{HALF}.mp4").exists()
    refused(call("run", "a", "--model", model, "--run", "r", "--out", f"{HALF}.mp4", *ONE), "run.json")
    assert not (tmp_path / "runs/r").exists()


def test_a_working_folder_with_such_a_name(call, model, tmp_path, monkeypatch):
    """What lies in it is found by its whole path, which no manifest could hold."""
    (tmp_path / HALF).mkdir()
    monkeypatch.chdir(tmp_path / HALF)
    (tmp_path / HALF / "lora.safetensors").touch()
    assert call("generate", "a", "--model", model, "--out", "x.mp4", *ONE).code == 0
    refused(call("generate", "a", "--model", model, "--loras", "lora.safetensors", *ONE), "loras")


def test_a_file_of_a_model(call, model, tmp_path):
    mine = shutil.copytree(model, tmp_path / "mine")
    (file,) = (mine / "vae").glob("*.safetensors")
    file.rename(file.with_name(f"{HALF}.safetensors"))
    refused(call("generate", "a", "--model", mine, *ONE), "caf")


def test_what_others_answer():
    answer = Answer("a \ud83d", "a \ud83d", "", "m", "", "", "stop", None, None)
    with pytest.raises(PlaceError, match="half of a character"):
        whole(answer, "http://x")
    with pytest.raises(StateError, match="plain JSON"):
        State({"prompt": ["a \ud83d"]})
    with pytest.raises(SetupError, match="no UTF-8"):
        ditkit.load(HALF)


@pytest.mark.slow
def test_another_locale(tmp_path):
    """Under LC_ALL=POSIX without the UTF-8 mode Python reads the letters of a command line as bytes."""
    command = [sys.executable, "-m", "ditkit", "generate", "un café", *ONE]
    locale = {**alone(), "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=locale, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Set PYTHONUTF8=1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []

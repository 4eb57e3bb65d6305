"""A stage that fails: what was computed is kept, one sentence says why, the command that goes on leads to the same bits,
and the traceback is in a file."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ditkit
from ditkit import media, samples
from ditkit.cli import show
from ditkit.errors import PlaceError
from ditkit.execution.place import so_far
from ditkit.models.wan_vae import WanVAE
from ditkit.state import State

PROMPT = "a red circle"
MEMORY = "CUDA out of memory. Tried to allocate 9.50 GiB. GPU 0 has a total capacity of 8.00 GiB"


def commands(text: str) -> list[list[str]]:
    """The lines after the one that says how to go on, up to the error."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith("go on with:"))
    return [shlex.split(line) for line in lines[at + 1 :] if not line.startswith("error: ")]


def fail(monkeypatch, when, error: Exception) -> None:
    """As soon as an event is like this, once. The listener that warns is there in every run."""
    done = []

    def listener(event):
        if not done and when(event):
            done.append(True)
            raise error

    monkeypatch.setattr(show, "warn_of_truncation", listener)


def after(index: int, name: str = "step.end"):
    return lambda event: event.name == name and event["step"].index == index


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError(MEMORY), "it wanted 9.50 GiB of memory, which was not there (OutOfMemoryError: CUDA"),
        (MemoryError(), "it wanted more memory, which was not there (MemoryError). Free some"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 137438953472 "
                      "bytes. Error code 12 (Cannot allocate memory)"), "it wanted 137438953472 bytes of memory"),
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors"), "it failed with RuntimeError"),
        (KeyError("blocks"), "it failed with KeyError: 'blocks'"),
    ],
)  # fmt: skip
def test_a_loop_that_fails(call, model, tmp_path, monkeypatch, error, found):
    words = ["--model", model, "--scheduler", "dpm++", "--no-sheet"]
    whole = call("generate", PROMPT, *words, "--json", "--out", "whole.npz")
    with monkeypatch.context() as patch:
        fail(patch, after(1), error)
        said = call("generate", PROMPT, *words, "--out", "a.npz", "--quiet")
    assert (said.code, said.out) == (1, "")
    note, command, sentence = said.err.splitlines()
    assert note.startswith("note: everything until then is kept in a.state.safetensors; once that is mended, go on")
    assert sentence.startswith("error: ")
    assert found in sentence
    assert sentence.endswith("its traceback is in a.traceback.txt.")
    assert names_in(tmp_path) == ["a.state.safetensors", "a.traceback.txt", "whole.json", "whole.npz"]
    traceback = (tmp_path / "a.traceback.txt").read_text()
    assert "Traceback (most recent call last)" in traceback
    assert type(error).__name__ in traceback
    assert State.load(tmp_path / "a.state.safetensors")["step"] == 2
    resumed = call(*shlex.split(command)[1:], "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["output_sha256"] == json.loads(whole.out)["output_sha256"]


@pytest.mark.parametrize(("part", "stage"), [("vae", "decode_latents"), ("text_encoder", "encode_text")])
def test_a_part_that_fails(call, model, tmp_path, monkeypatch, part, stage):
    def boom(*_, **__):
        raise torch.OutOfMemoryError(MEMORY)

    with monkeypatch.context() as patch:
        owner = WanVAE if part == "vae" else ditkit.load(model).components[part].__class__
        patch.setattr(owner, "decode" if part == "vae" else "__call__", boom)
        said = call("generate", PROMPT, "--model", model, "--out", "a.npz", "--no-sheet", "--quiet")
    assert said.code == 1
    assert f"error: running stage '{stage}': it wanted 9.50 GiB of memory" in said.err
    assert "Traceback" not in said.err
    (words,) = commands(said.err)
    assert call(*words[1:], "--quiet").code == 0
    np.testing.assert_array_equal(media.read_video(tmp_path / "a.npz")[0], ditkit.load(model)(PROMPT).video)


def test_debug_shows_the_traceback_too(call, model, monkeypatch):
    fail(monkeypatch, after(1), KeyError("blocks"))
    said = call("generate", PROMPT, "--model", model, "--out", "a.npz", "--quiet", "--debug")
    assert "Traceback (most recent call last)" in said.err
    assert said.err.splitlines()[-1].startswith("error: ")

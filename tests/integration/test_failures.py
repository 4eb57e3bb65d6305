"""A stage that fails: what was computed is kept, one sentence says why, the command that goes on leads to the same
bits, and the traceback is in a file."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import ditkit
from ditkit import media, samples
from ditkit.cli import show
from ditkit.cli.main import main
from ditkit.errors import PlaceError
from ditkit.execution.place import so_far
from ditkit.models.wan_vae import WanVAE
from ditkit.runs.run import listed
from ditkit.state import State

PROMPT = "a red circle"
MEMORY = "CUDA out of memory. Tried to allocate 9.50 GiB. GPU 0 has a total capacity of 8.00 GiB"


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch) -> None:
    """Tracebacks that have no other place."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


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


@pytest.mark.slow
def test_a_loop_that_fails(call, model, tmp_path, monkeypatch):
    words = ["--model", model, "--scheduler", "dpm++", "--no-sheet"]
    whole = call("generate", PROMPT, *words, "--json", "--out", "whole.npz")
    with monkeypatch.context() as patch:
        fail(patch, after(1), torch.OutOfMemoryError(MEMORY))
        said = call("generate", PROMPT, *words, "--out", "a.npz", "--quiet")
    assert (said.code, said.out) == (1, "")
    note, command, sentence = said.err.splitlines()
    assert note.startswith("note: everything until then is kept in a.state.safetensors; once that is mended, go on")
    assert sentence.startswith("error: ")
    assert "it wanted 9.50 GiB of memory, which was not there (OutOfMemoryError: CUDA out" in sentence
    assert sentence.endswith("its traceback is in a.traceback.txt.")
    assert names_in(tmp_path) == ["a.state.safetensors", "a.traceback.txt", "whole.json", "whole.npz"]
    traceback = (tmp_path / "a.traceback.txt").read_text()
    assert "Traceback (most recent call last)" in traceback
    assert "OutOfMemoryError" in traceback
    assert State.load(tmp_path / "a.state.safetensors")["step"] == 2
    resumed = call(*shlex.split(command)[1:], "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["output_sha256"] == json.loads(whole.out)["output_sha256"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_of_several_clips_the_finished_ones_and_the_waiting_ones_are_kept(call, model, tmp_path, monkeypatch):
    seen = []
    with monkeypatch.context() as patch:
        fail(patch, lambda e: after(1)(e) and (seen.append(1) or len(seen) == 2), MemoryError("no room"))
        said = call(
            "generate", PROMPT, "--model", model, "--set", "seed=[1, 2, 3]", "--no-sheet", "--out", "x.npz", "-q"
        )
    assert said.code == 1
    states = [State.load(tmp_path / f"x.state-{i}.safetensors") for i in range(3)]
    assert [samples.count(s) for s in states] == [1, 1, 1]
    assert ["video" in s for s in states] == [True, False, False]
    assert states[1]["step"] == 2
    for words in commands(said.err):
        assert call(*words[1:], "--quiet").code == 0
    for i, seed in enumerate([1, 2, 3]):
        expected = ditkit.load(model)(PROMPT, seed=seed).video
        np.testing.assert_array_equal(media.read_video(tmp_path / f"x-{i}.npz")[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("clips", [1, 2])
def test_a_kept_run_goes_on_from_the_step_that_failed(call, model, tmp_path, monkeypatch, clips):
    """Also where fewer States are kept than steps are taken."""
    seeds, seen = [*range(clips)], []
    with monkeypatch.context() as patch:
        fail(patch, lambda e: after(2)(e) and (seen.append(1) or len(seen) == clips), MemoryError())
        said = call("run", PROMPT, "--model", model, "--set", f"seed={seeds}", "--run", "r", "--every", "4", "-q")
    assert said.code == 1
    note, _, sentence = said.err.splitlines()
    assert note == "note: the run is kept; once that is mended, go on with:"
    assert sentence.endswith("its traceback is in runs/r/run.traceback.txt.") or str(tmp_path) in sentence
    assert (tmp_path / "runs/r/run.traceback.txt").exists()
    assert list((tmp_path / "runs/r/states").glob("*-step-3.safetensors"))
    (words,) = commands(said.err)
    assert call(*words[1:], "--quiet").code == 0
    for i in seeds:
        clip = tmp_path / "runs/r" / ("clip.mp4" if clips == 1 else f"clip-{i}.mp4")
        expected = ditkit.load(model)(PROMPT, seed=i)
        assert media.read_manifest(clip)["output_sha256"] == expected.manifests[0]["output_sha256"]


@pytest.mark.slow
def test_going_on_and_forking_fail_in_the_same_way(call, model, tmp_path, monkeypatch):
    assert call("run", PROMPT, "--model", model, "--run", "r", "--keep-steps", "all", "-q").code == 0
    saved = call("run", PROMPT, "--model", model, "--stop-at-step", "1", "--save-state", "s.st", "-q")
    assert saved.code == 0
    for words in (
        ["run", "--from", "s.st", "--out", "a.npz"],
        ["fork", "r", "--at-step", "1", "--guidance-scale", "2"],
    ):
        with monkeypatch.context() as patch:
            fail(patch, after(1), KeyError("x"))
            said = call(*words, "--no-sheet", "-q")
        assert said.code == 1
        assert said.err.splitlines()[-1].startswith("error: ")
        assert "it failed with KeyError: 'x'" in said.err
        (again,) = commands(said.err)
        assert call(*again[1:], "-q").code == 0
    np.testing.assert_array_equal(media.read_video(tmp_path / "a.npz")[0], ditkit.load(model)(PROMPT).video)


def test_a_clip_that_cannot_be_written_costs_no_compute(call, model, tmp_path, monkeypatch):
    taken = tmp_path / "in/a.npz"

    def listener(event):
        if event.name == "stage.end" and event["stage"] == "decode_latents" and not taken.exists():
            taken.mkdir()

    monkeypatch.setattr(show, "warn_of_truncation", listener)
    (tmp_path / "in").mkdir()
    said = call("generate", PROMPT, "--model", model, "--out", "in/a.npz", "--no-sheet", "-q")
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith("error: writing in/a.npz: ")
    (words,) = commands(said.err)
    taken.rmdir()
    resumed = call(*words[1:], "--json")
    assert json.loads(resumed.out)["skipped"].keys() == {"encode_text", "denoise", "decode_latents"}


def test_an_error_before_anything_was_computed_leaves_nothing(call, model, tmp_path, monkeypatch):
    fail(monkeypatch, lambda e: e.name == "load.start", PlaceError("a", "b", "c"))
    assert call("generate", PROMPT, "--model", model, "--out", "a.npz", "-q").code == 1
    assert names_in(tmp_path) == []


def test_an_own_error_in_the_loop_keeps_the_steps(call, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail(patch, after(2), PlaceError("reaching a host", "it is gone", "Start it"))
        said = call("generate", PROMPT, "--model", model, "--out", "a.npz", "--no-sheet", "-q")
    assert said.code == 1
    assert said.err.splitlines()[-1] == "error: reaching a host: it is gone. Start it."
    assert names_in(tmp_path) == ["a.state.safetensors"]
    assert State.load(tmp_path / "a.state.safetensors")["step"] == 3


def test_in_python_the_error_stays_what_it_is_and_carries_the_state(model):
    def listener(event):
        if after(1)(event):
            raise KeyError("here")

    pipe = ditkit.load(model)
    with pytest.raises(KeyError) as caught:
        pipe(PROMPT, listeners=[listener])
    had = so_far(caught.value)
    assert had is caught.value.so_far
    assert (had.stage, had.state["step"], had.finished) == ("denoise", 2, [])
    np.testing.assert_array_equal(pipe.run(had.state).video, pipe(PROMPT).video)


def test_what_plugs_remember_is_kept_too(tiny_model):
    from remembering import FirstBlockCache

    def listener(event):
        if after(2)(event):
            raise MemoryError

    pipe = ditkit.load(tiny_model, seams=ditkit.Seams(run_blocks=(FirstBlockCache(0.5),)))
    with pytest.raises(MemoryError) as caught:
        pipe(PROMPT, listeners=[listener])
    state = State.from_bytes(caught.value.so_far.state.to_bytes())
    assert state["memory"]
    np.testing.assert_array_equal(pipe.run(state).video, pipe(PROMPT).video)


@pytest.mark.slow
def test_a_stage_that_fails_elsewhere_sends_what_it_has(call, model, tmp_path):
    """The step that fails does so in the child process, whose State comes back with the error."""
    (tmp_path / "plug.py").write_text(FAILS)
    words = ["--model", model, "--no-sheet", "--plug", "plug.py:Fails", "-q"]
    said = call("generate", PROMPT, *words, "--placement", "denoise=process", "--out", "a.npz")
    assert said.code == 1
    assert "with plug.py:Fails plugged in (at process): it wanted 2.00 GiB of memory" in said.err
    assert State.load(tmp_path / "a.state.safetensors")["step"] == 2


FAILS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Fails:
    seam = "predict"

    def __call__(self, predict):
        def around(x, step):
            if step.index == 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return predict(x, step)
        return around
"""


def test_bench_says_one_sentence(call, model, monkeypatch):
    def boom(*_, **__):
        raise torch.OutOfMemoryError(MEMORY)

    monkeypatch.setattr(WanVAE, "decode", boom)
    said = call("bench", "quality", "--clips", "1", "--model", model)
    assert said.code == 1
    assert said.err.startswith("error: running stage 'decode_latents': it wanted 9.50 GiB of memory")
    assert len(said.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(MEMORY), KeyboardInterrupt()])
def test_a_replay_goes_on_too(call, model, tmp_path, monkeypatch, error):
    assert call("generate", PROMPT, "--model", model, "--out", "a.npz", "--no-sheet", "-q").code == 0

    def boom(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(WanVAE, "decode", boom)
        said = call("replay", "a.npz", "-q")
    interrupted = isinstance(error, KeyboardInterrupt)
    assert said.code == (130 if interrupted else 1)
    assert State.load(tmp_path / "a.state.safetensors")["step"] == 4
    (command,) = [line for line in said.err.splitlines() if line.startswith("  ditkit replay a.npz")]
    again = call(*shlex.split(command)[1:])
    assert (again.code, again.err) == (0, "")
    assert "denoise: skipped" in again.out
    assert "identical" in again.out
    other = call("run", PROMPT, "--seed", "5", "--model", model, "--until", "encode_text", "--save-state", "b.st", "-q")
    assert other.code == 0
    assert "it was begun for another clip" in call("replay", "a.npz", "--from", "b.st").err


def test_a_library_that_finds_no_certificates(call, model, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    said = call("expand", PROMPT, "--expander", "http://127.0.0.1:1/v1", "--retries", "0")
    assert said.code == 1
    assert "SSL_CERT_FILE names /nowhere.pem" in said.err
    words = ["--model", model, "--steps", "1", "--no-sheet", "-q", "--out", "a.npz", "--expand", "yes"]
    said = call("generate", PROMPT, *words, "--expander", "http://127.0.0.1:1/v1", "--expand-fallback")
    assert said.code == 0
    assert "SSL_CERT_FILE names /nowhere.pem" in said.err


def test_an_error_from_outside_of_the_stages(call, model, tmp_path, monkeypatch):
    """One sentence with the file that it is about, a traceback in a file, and no talk of the output."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for error, word in (
        (PermissionError(13, "Permission denied", "/a/b"), "ditkit runs: /a/b: permission denied. Check the path"),
        (EOFError("no more"), "it failed with EOFError: no more"),
        (BrokenPipeError(32, "Broken pipe"), "ditkit runs: broken pipe"),
        (RecursionError("too deep"), "it failed with RecursionError"),
    ):

        def raises(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("ditkit.runs.listed", raises)
            said = call("runs")
        assert said.code == 1
        assert len(said.err.splitlines()) == 1
        assert word in said.err
        (file,) = tmp_path.glob("ditkit-*.txt")
        assert str(file) in said.err
        assert "Traceback" in file.read_text()
        file.unlink()


def test_a_working_folder_that_was_removed(call, model, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (["runs"], ["run", PROMPT, "--model", model, "--run", "r"], ["generate", PROMPT, "--model", model]):
        said = call(*words, *(() if words == ["runs"] else ("-q",)))
        assert said.code in (1, 2)
        assert len(said.err.splitlines()) == 1
        assert "the output" not in said.err


def test_a_folder_among_the_runs_that_cannot_be_looked_into(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    (tmp_path / "runs/closed").mkdir(parents=True)
    (tmp_path / "runs/closed").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    listed("runs")  # imports what it needs
    os.seteuid(65534)
    try:
        (one,) = listed("runs")
    finally:
        os.seteuid(0)
    assert (one.progress, one.fault) == ("damaged", "looking into runs/closed: permission denied")


def test_a_process_without_streams(tmp_path, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.chdir(tmp_path)
    assert main(["stages"]) == 0
    assert main(["nonsense"]) == 2
    assert main(["runs", "nowhere"]) == 2


def test_an_error_stream_that_takes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", full)
    assert main(["runs", "nowhere"]) == 2
    with suppress(OSError):
        full.close()

"""Ctrl-C: what was done is kept, the command that goes on is printed, and it leads to the same bits."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shell import alone

import ditkit
from ditkit import media, samples
from ditkit.cli import show
from ditkit.cli.main import main
from ditkit.state import State

PROMPT = "a red circle"
SOLVERS = {"unipc": ["--scheduler-options", "order=3"], "dpm++": [], "dpm++_sde": [], "euler": []}


def commands(text: str) -> list[list[str]]:
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith("Resume with:"))
    return [shlex.split(line) for line in lines[at + 1 :]]


def press(monkeypatch, when) -> None:
    """Ctrl-C as soon as an event is like this. The listener that warns is there in every run."""
    done = []

    def listener(event):
        if not done and when(event):
            done.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(show, "warn_of_truncation", listener)


def step(name: str, index: int):
    return lambda event: event.name == name and event["step"].index == index


@pytest.mark.parametrize("scheduler", SOLVERS)
@pytest.mark.parametrize(
    ("name", "index", "reached"), [("step.start", 0, 0), ("prediction", 2, 2), ("step.end", 1, 2), ("step.end", 3, 4)]
)
def test_the_run_goes_on_bit_for_bit(call, model, tmp_path, monkeypatch, scheduler, name, index, reached):
    words = ["--model", model, "--scheduler", scheduler, *SOLVERS[scheduler], "--set", "dtype_policy=float32"]
    whole = call("generate", PROMPT, *words, "--json", "--no-sheet", "--out", "whole.npz")
    press(monkeypatch, step(name, index))
    said = call("generate", PROMPT, *words, "--out", "a.npz", "--no-sheet", "--quiet")
    assert said.code == 130
    assert said.err.startswith(
        f"error: interrupted in denoise after step {reached} of 4: everything until then is kept in "
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.state.safetensors", "whole.json", "whole.npz"]
    assert State.load(tmp_path / "a.state.safetensors")["step"] == reached
    (words,) = commands(said.err)
    assert words[0] == "ditkit"
    assert "--dtype-policy" in words
    resumed = call(*words[1:], "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["clips"] == ["a.npz"]
    assert json.loads(resumed.out)["output_sha256"] == json.loads(whole.out)["output_sha256"]


@pytest.mark.parametrize(
    ("when", "stage", "fields"),
    [
        (lambda e: e.name == "load.start" and e["component"] == "text_encoder", "encode_text", {"prompt"}),
        (lambda e: e.name == "load.end" and e["component"] == "transformer", "encode_text", {"prompt"}),
        (lambda e: e.name == "frames", "decode_latents", {"prompt", "prompt_embeds", "latents", "sigmas"}),
    ],
)
def test_outside_the_loop(call, model, tmp_path, monkeypatch, when, stage, fields):
    press(monkeypatch, when)
    said = call("generate", PROMPT, "--model", model, "--out", "a.npz")
    assert said.code == 130
    assert f"interrupted in {stage}" in said.err
    assert fields <= set(State.load(tmp_path / "a.state.safetensors"))
    (words,) = commands(said.err)
    assert call(*words[1:]).code == 0
    expected = ditkit.load(model)(PROMPT).video
    np.testing.assert_array_equal(media.read_video(tmp_path / "a.npz")[0], expected)
    assert (tmp_path / "a-sheet.png").exists()


def test_while_the_results_are_written(call, model, tmp_path, monkeypatch):
    real = os.fsync

    def interrupted(number):
        patch.setattr("os.fsync", real)  # once; the State that is kept is brought to the disk too
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupted)
        said = call("generate", PROMPT, "--model", model, "--out", "a.npz", "--no-sheet")
    assert said.code == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.state.safetensors"]
    (words,) = commands(said.err)
    resumed = call(*words[1:], "--json")
    assert json.loads(resumed.out)["skipped"].keys() == {"encode_text", "denoise", "decode_latents"}
    assert (tmp_path / "a.npz").exists()


def test_of_several_clips_each_gets_its_own_state(call, model, tmp_path, monkeypatch):
    seen = []
    press(monkeypatch, lambda e: e.name == "step.end" and e["step"].index == 1 and (seen.append(1) or len(seen) == 2))
    words = ["--model", model, "--seed", "1", "--seed", "2", "--seed", "3", "--no-sheet"]
    said = call("generate", PROMPT, *words, "--out", "x.npz", "--quiet")
    assert said.code == 130
    states = [State.load(tmp_path / f"x.state-{i}.safetensors") for i in range(3)]
    assert [samples.count(s) for s in states] == [1, 1, 1]
    assert ["video" in s for s in states] == [True, False, False]
    assert states[1]["step"] == 2
    for words in commands(said.err):
        assert call(*words[1:], "--quiet").code == 0
    for i, seed in enumerate([1, 2, 3]):
        expected = ditkit.load(model)(PROMPT, seed=seed).video
        np.testing.assert_array_equal(media.read_video(tmp_path / f"x-{i}.npz")[0], expected)


def test_a_part_of_a_run_goes_on_to_its_own_end(call, model, tmp_path, monkeypatch):
    press(monkeypatch, step("step.end", 0))
    said = call("run", PROMPT, "--model", model, "--stop-at-step", "3", "--save-state", "s.st", "--quiet")
    assert said.code == 130
    assert State.load(tmp_path / "s.st")["step"] == 1
    (words,) = commands(said.err)
    assert call(*words[1:]).code == 0
    assert State.load(tmp_path / "s.st")["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.st"]


def test_settings_of_a_file_or_the_environment_are_spelled_out(call, model, tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_text(
        f"model = {json.dumps(str(model))}\nremember_text = false\n[dtypes]\nvae = 'float64'\n"
    )
    press(monkeypatch, step("step.end", 0))
    with monkeypatch.context() as patch:
        patch.setenv("DITKIT_VAE_FRAMES_PER_CHUNK", "2")
        said = call("generate", PROMPT, "--config", "c.toml", "--out", "a.npz", "--no-sheet", "--quiet")
    (words,) = commands(said.err)
    (tmp_path / "c.toml").unlink()
    assert call(*words[1:]).code == 0
    setup = media.read_manifest(tmp_path / "a.npz")["setup"]
    wanted = {"cache_text_kv": False, "dtypes": {"vae": "float64"}, "vae_frames_per_chunk": 2, "model": str(model)}
    assert {key: setup[key] for key in wanted} == wanted


def test_a_full_disk_under_the_kept_state_is_told(call, model, tmp_path, monkeypatch):
    import resource

    press(monkeypatch, step("step.end", 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, hard))
        said = call(
            "generate",
            PROMPT,
            "--model",
            model,
            "--width",
            256,
            "--height",
            512,
            "--out",
            "a.npz",
            "--no-sheet",
            "--quiet",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said.code == 2
    assert "saving the State to a.state.safetensors: File too large" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_ended_session_keeps_the_state_too(call, model, tmp_path, monkeypatch, name):
    number, seen = getattr(signal, name), []
    unhandled = signal.signal(number, signal.SIG_DFL)

    def listener(event):
        if step("step.end", 1)(event) and not seen:
            seen.append(signal.getsignal(number))
            assert seen != [signal.SIG_DFL], "the signal would end this process"
            signal.raise_signal(number)

    monkeypatch.setattr(show, "warn_of_truncation", listener)
    try:
        said = call("generate", PROMPT, "--model", model, "--out", "a.npz", "--no-sheet", "--quiet")
        assert signal.getsignal(number) == signal.SIG_DFL
        assert said.code == 130
        assert State.load(tmp_path / "a.state.safetensors")["step"] == 2
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        seen.clear()
        assert call("generate", PROMPT, "--model", model, "--out", "b.npz", "--no-sheet", "--quiet").code == 0
        assert seen == [signal.SIG_IGN]
    finally:
        signal.signal(number, unhandled)


def test_a_real_interrupt_of_a_real_process(model, tmp_path, monkeypatch, capsys):
    """Begun from encoded text, which spares both processes the import of transformers."""
    monkeypatch.chdir(tmp_path)
    words = [PROMPT, "--model", str(model), "--steps", "300"]
    assert main(["run", *words, "--until", "encode_text", "--save-state", "s.st", "--quiet"]) == 0
    assert main(["run", "--from", "s.st", "--out", "whole.npz", "--no-sheet", "--quiet"]) == 0
    capsys.readouterr()
    command = [sys.executable, "-m", "ditkit"]
    run = [*command, "run", "--from", "s.st", "--out", "a.npz", "--no-sheet"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(run, cwd=tmp_path, text=True, env=alone(), **pipes)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1 of 300"):
            process.send_signal(signal.SIGINT)
            break
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in told
    (words,) = commands(told)
    reached = State.load(tmp_path / "a.state.safetensors")["step"]
    assert 1 <= reached < 300
    assert not Path(tmp_path / "a.npz").exists()
    done = subprocess.run([*command, *words[1:]], cwd=tmp_path, capture_output=True, text=True, env=alone())
    assert done.returncode == 0, done.stderr
    whole, resumed = (media.read_video(tmp_path / name)[0] for name in ("whole.npz", "a.npz"))
    np.testing.assert_array_equal(resumed, whole)

"""The same run gives the same bits: in processes of other hash seeds, folders, locales, time zones and rights, with a
clock that jumps, and whatever ran before it in the same process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

import pytest
import torch
from forks import ended, fork
from safetensors.torch import save_file
from shell import alone

import ditkit
from ditkit.cli.main import main
from ditkit.errors import StateError
from ditkit.media import read_video
from ditkit.runs import Run, listed
from ditkit.state import State

PROMPT = "a red circle"
AROUND = {
    "plain": {"PYTHONHASHSEED": "0", "TZ": "UTC", "umask": "022"},
    "with a space": {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "umask": "077"},
    "ümläut": {"LC_ALL": "C.UTF-8", "TZ": "America/St_Johns", "umask": "000"},
    "a'b\"c": {"LC_ALL": "xx_XX", "TZ": "nowhere", "umask": "027"},
    "optimised": {"PYTHONHASHSEED": "random", "PYTHONOPTIMIZE": "1", "LC_ALL": "C", "TZ": "", "umask": "007"},
}
"""Folders, and what is around each. Python is started anew where it is about Python, and forked elsewhere."""


@pytest.mark.slow
def test_five_processes_make_the_same_bits(model, tmp_path):
    words = ["run", PROMPT, "--model", str(model), "--seed", "3", "--steps", "2", "--save-state", "s.safetensors",
             "--out", "clip.png", "--no-sheet", "--quiet", "--threads", "1"]  # fmt: skip
    kept = {name: value for name, value in alone().items() if not name.startswith(("LC_", "LANG"))}
    for name, around in AROUND.items():
        (folder := tmp_path / name).mkdir()
        environment, mask = {**kept, **{k: v for k, v in around.items() if k != "umask"}}, int(around["umask"], 8)
        if "PYTHONHASHSEED" in around:
            command = [sys.executable, "-m", "ditkit", *words]
            done = subprocess.run(command, cwd=folder, env=environment, umask=mask, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            continue

        def work(folder=folder, environment=environment, mask=mask):
            os.chdir(folder)
            os.umask(mask)
            os.environ.clear()
            os.environ.update(environment)
            time.tzset()
            assert main(words) == 0

        assert ended(fork(work, log := tmp_path / "log")) == 0, log.read_text()
    first, *others = (tmp_path / name for name in AROUND)
    state = State.load(first / "s.safetensors")
    for folder in others:
        assert (folder / "s.safetensors").read_bytes() == (first / "s.safetensors").read_bytes(), folder.name
        assert State.load(folder / "s.safetensors").fingerprints == state.fingerprints
        for frame in sorted((first / "clip").iterdir())[1:]:  # the first one carries the card, which tells of times
            assert (folder / "clip" / frame.name).read_bytes() == frame.read_bytes()
        assert (read_video(folder / "clip")[0] == read_video(first / "clip")[0]).all()


@pytest.mark.slow
def test_whatever_ran_before_changes_no_bit(tiny_model, tmp_path):
    """Each of these after each of the others, in one process, with parts that they share."""
    name, g = "transformer.blocks.0.attn1.to_q", torch.Generator().manual_seed(1)
    factors = torch.randn(2, 64, generator=g), torch.randn(64, 2, generator=g)
    save_file({f"{name}.lora_A.weight": factors[0], f"{name}.lora_B.weight": factors[1]}, tmp_path / "lora.safetensors")
    lora = [str(tmp_path / "lora.safetensors")]
    setups = [{}, {"loras": lora}, {"loras": lora, "lora_mode": "fused"}, {"dtype": "bfloat16"},
              {"cache": str(tmp_path / "cache")}, {"debug": True}]  # fmt: skip
    requests = [{}, {"guidance_scale": 1.0}, {"scheduler": "euler"}, {"negative_prompt": "blue"}]
    first = ditkit.load(tiny_model)
    pipes = [first, *(ditkit.load(tiny_model, share_with=first, **setup) for setup in setups[1:])]
    calls = [(pipe, {}) for pipe in pipes] + [(first, request) for request in requests[1:]]
    known: dict[int, State] = {}
    order = []  # a sequence of de Bruijn's: each of all pairs stands in it once
    for one in range(len(calls)):
        order += [one, *(each for other in range(one + 1, len(calls)) for each in (one, other))]
    assert len({*itertools.pairwise([*order, 0])}) == len(calls) ** 2
    for before, index in itertools.pairwise([0, *order, 0]):
        pipe, request = calls[index]
        state = pipe(PROMPT, seed=3, steps=1, **request).state
        assert state.equal(known.setdefault(index, state)), f"{index} after {before}"
        assert state.fingerprints == known[index].fingerprints
    assert known[0].equal(known[4]), "a cache changes nothing"


@pytest.mark.parametrize("now", [0.0, 1e9, 4e9])
def test_a_clock_that_jumps_loses_nothing(tiny_model, tmp_path, monkeypatch, now):
    """1970, years back and years ahead, in the middle of a run with a cache."""
    pipe = ditkit.load(tiny_model, cache=str(tmp_path / "cache"))
    whole = pipe(PROMPT, seed=3, steps=2).state
    run = Run.create(tmp_path / "runs" / "a", pipe, PROMPT, seed=3, steps=2)
    run.go(stop_at_step=1)
    for file in tmp_path.rglob("*"):
        os.utime(file, (now, now))
    monkeypatch.setattr(time, "time", lambda: now)
    again = ditkit.load(tiny_model, cache=str(tmp_path / "cache"))
    result = Run.open(tmp_path / "runs" / "a", again).go()
    assert result.state.equal(whole)
    assert set(again(PROMPT, seed=3, steps=2).receipt["stages"]) == set(), "all of it is still in the cache"
    assert [each.progress for each in listed(tmp_path / "runs")] == ["done"]
    assert again.results.trim() == 0


@pytest.mark.slow
def test_two_processes_on_one_run_and_one_output(tiny_model, tmp_path):
    """One of them works on the run, and the other is told so or finds it done; of the clips there is one whole one."""
    pipe = ditkit.load(tiny_model)
    whole = pipe(PROMPT, seed=3, steps=2)
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=3, steps=2)

    def work():
        for _ in range(600):
            try:
                result = Run.open(tmp_path / "a", pipe).go()
            except StateError as e:
                if "another process does so" not in str(e):
                    raise
                time.sleep(0.1)
                continue
            assert result.state.equal(whole.state)
            result.save(tmp_path / "clip.npz")
            return
        raise AssertionError("it never had its turn")

    pids = [fork(work, tmp_path / f"log-{number}") for number in range(3)]
    assert [ended(pid) for pid in pids] == [0] * 3, [log.read_text() for log in tmp_path.glob("log-*")]
    assert run.state().equal(whole.state)
    assert (read_video(tmp_path / "clip.npz")[0] == whole.video).all()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("log")) == ["a", "clip.json", "clip.npz"]

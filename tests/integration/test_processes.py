"""Stages in child processes: they crash, hang, are interrupted and are left behind, and no run is the worse for it.

That they compute the same is shown in test_every_placement.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from acting import at_step, same
from safetensors.torch import save_file
from shell import alone

import ditkit
from ditkit.errors import LoadError, Lost, PlaceError
from ditkit.placement.http.client import HTTPChannel
from ditkit.placement.process.parent import ProcessChannel
from ditkit.placement.spec import Spec
from ditkit.setup import Setup

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
PROMPT = "a red circle"
LONG = 200  # steps of a run that is still at work when its child is told to end


def placed(model, *stages, **setup):
    """A pipe with stages in a child, and the channel to it."""
    pipe = ditkit.load(model, placement=dict.fromkeys(stages or ("denoise",), "process"), **setup)
    channel = pipe.places.remote(Spec.parse("process")).channel
    assert isinstance(channel, ProcessChannel)
    return pipe, channel


@pytest.fixture(scope="module")
def whole(tiny_model):
    return ditkit.load(tiny_model)(PROMPT, seed=3).state


@pytest.fixture(scope="module")
def long(tiny_model):
    return ditkit.load(tiny_model)(PROMPT, seed=3, steps=LONG).state


@pytest.fixture(scope="module")
def shared(tiny_model):
    """A child for tests that leave it as it was."""
    pipe, channel = placed(tiny_model)
    pipe(PROMPT, seed=3)
    yield pipe, channel
    pipe.places.close()


def ended(pid: int, seconds: float = 30.0) -> bool:
    """Whether the process ends in time; one that is dead and was not waited for counts."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


# --- crashes


@linux
def test_a_killed_child_is_replaced_and_the_run_is_the_same(tiny_model, long):
    pipe, channel = placed(tiny_model)
    pids = []

    def kill():
        pids.append(channel.process_id)
        os.kill(channel.process_id, signal.SIGKILL)

    result = pipe(PROMPT, seed=3, steps=LONG, listeners=[at_step(0, kill)])
    assert same(result.state, long)
    (retry,) = result.receipt["retries"]
    assert "signal SIGKILL" in retry["why"]
    assert channel.process_id not in (None, *pids)
    pipe.places.close()
    assert channel.process_id is None


@linux
def test_a_crash_tells_its_signal_and_its_last_words(tiny_model, monkeypatch):
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    pipe, channel = placed(tiny_model, retries=0)
    crash = at_step(0, lambda: os.kill(channel.process_id, signal.SIGSEGV))
    with pytest.raises(PlaceError, match=r"running stage 'denoise' at process: .*SIGSEGV and said: .*child.py") as e:
        pipe(PROMPT, seed=3, steps=LONG, listeners=[crash])
    assert e.value.exit_code == 1
    pipe.places.close()


@linux
def test_a_child_that_hangs_is_lost_after_patience(tiny_model, long):
    pipe, channel = placed(tiny_model, timeout=2)
    hang = at_step(0, lambda: os.kill(channel.process_id, signal.SIGSTOP))
    pid = channel._started().process.pid
    result = pipe(PROMPT, seed=3, steps=LONG, listeners=[hang])
    assert same(result.state, long)
    assert "no sign of life" in result.receipt["retries"][0]["why"]
    assert ended(pid)
    pipe.places.close()


def test_a_child_that_hangs_at_its_start_is_lost(tiny_model, monkeypatch):
    from ditkit.placement.process import parent as process

    born, spawn = [], process._spawned

    def stopped():
        child, *rest = spawn()
        os.kill(child.pid, signal.SIGSTOP)
        born.append(child)
        return child, *rest

    monkeypatch.setattr(process, "_spawned", stopped)
    monkeypatch.setattr(process, "START", 0.5)
    channel = ProcessChannel(Setup(model=str(tiny_model), timeout=0.5), None, ["encode_text"])
    with pytest.raises(Lost, match=r"starting a child process for process: it gave no sign of life in 0\.5 s"):
        channel.ask("describe")
    assert [child.poll() is not None for child in born] == [True], "and it is ended"


def test_what_opening_the_model_raises_there_is_raised_here(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    pipe, channel = placed(folder)
    state = pipe.begin(pipe.model.request({"prompt": PROMPT}))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(LoadError, match=r"at process"):
        pipe.run(state)
    assert channel.process_id is None


# --- left behind

PARENT = """
import sys, ditkit
pipe = ditkit.load(sys.argv[1], placement={"denoise": "process"})
channel = pipe.places.remote(next(iter(pipe.places.specs.values()))).channel
channel.ask("describe")
print(channel.process_id, channel._child.folder.path, flush=True)
sys.stdin.readline()
"""


@linux
@pytest.mark.parametrize("how", ["killed", "ends"])
def test_a_child_ends_with_its_parent(tiny_model, how):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tiny_model)], env=alone(), **pipes)
    child, _, folder = parent.stdout.readline().strip().partition(" ")
    assert Path(f"/proc/{child}").exists()
    if how == "killed":
        parent.kill()
    parent.communicate("\n")
    assert ended(int(child))
    if how == "ends":
        assert not Path(folder).exists()


def test_a_child_ends_with_its_stdin_in_the_middle_of_what_it_does(tiny_model, tmp_path):
    """What holds where there is no prctl."""
    told = {"setup": {"model": str(tiny_model)}, "stages": ["denoise"], "threads": 1, "alive": 1.0,
            "socket": str(tmp_path / "s"), "token": "t"}  # fmt: skip
    words = [sys.executable, "-m", "ditkit.placement.process.child"]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=alone())
    child.stdin.write(json.dumps(told).encode() + b"\n")
    child.stdin.flush()
    assert child.stdout.readline().lstrip(b".") == b"\n"
    child.communicate(timeout=30)
    assert child.returncode == 0


def test_a_child_outlives_the_thread_that_asked_for_it(tiny_model, whole):
    pipe, channel = placed(tiny_model)
    thread = threading.Thread(target=channel.ask, args=["describe"])
    thread.start()
    thread.join()
    pid = channel.process_id
    assert same(pipe(PROMPT, seed=3).state, whole)
    assert channel.process_id == pid
    pipe.places.close()


def test_children_of_two_pipes_are_two(tiny_model, shared, whole):
    other, channel = placed(tiny_model)
    assert same(other(PROMPT, seed=3).state, whole)
    pid = channel.process_id
    assert pid != shared[1].process_id
    other.places.close()
    assert ended(pid) if sys.platform == "linux" else True
    assert same(shared[0](PROMPT, seed=3).state, whole), "the other's child is as it was"


def test_nobody_else_is_let_in(shared):
    child = shared[1]._started()
    assert stat.S_IMODE(child.folder.path.stat().st_mode) == 0o700
    stranger = HTTPChannel("http://process", uds=str(child.folder.path / "child"))
    assert stranger.ask("health")
    with pytest.raises(PlaceError, match="token"):
        stranger.ask("describe")


def test_threads_share_a_child(shared, tiny_model):
    pipe, channel = shared
    pid, alone, found = channel.process_id, ditkit.load(tiny_model), {}
    threads = [threading.Thread(target=lambda s=s: found.update({s: pipe(PROMPT, seed=s)})) for s in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[s].state, alone(PROMPT, seed=s).state) for s in range(7))
    assert channel.process_id == pid
    assert not any(result.receipt["retries"] for result in found.values())


# --- what reaches it


def test_loras_reach_it(tiny_model, tmp_path, whole):
    path, name, g = tmp_path / "lora.safetensors", "transformer.blocks.0.attn1.to_q", torch.Generator().manual_seed(1)
    factors = torch.randn(2, 64, generator=g), torch.randn(64, 2, generator=g)
    save_file({f"{name}.lora_A.weight": factors[0], f"{name}.lora_B.weight": factors[1]}, path)
    pipe, _ = placed(tiny_model, loras=[str(path)])
    there, here = pipe(PROMPT, seed=3), ditkit.load(tiny_model, loras=[str(path)])(PROMPT, seed=3)
    assert same(there.state, here.state)
    assert not torch.equal(there.state["latents"], whole["latents"])
    pipe.places.close()


def test_python_objects_in_a_seam_are_refused(shared):
    pipe, _ = shared
    seams = ditkit.Seams(predict=(lambda inner: inner,))
    other = ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, seams)
    other.places = pipe.places
    with pytest.raises(PlaceError, match="predict is changed here by Python objects"):
        other(PROMPT)


def test_options_of_a_stage_travel(tiny_model, shared):
    """The child was started with others."""
    other, here = (
        ditkit.load(tiny_model, attention="dense", **more) for more in ({"placement": {"denoise": "process"}}, {})
    )
    other.places = shared[0].places
    assert same(other(PROMPT, seed=3).state, here(PROMPT, seed=3).state)


# --- Ctrl-C and the command line


@pytest.mark.parametrize("index", [0, 2, 3])
def test_ctrl_c_keeps_the_state(shared, whole, index):
    def press():
        raise KeyboardInterrupt

    pipe, channel = shared
    pid = channel.process_id
    with pytest.raises(ditkit.Interrupted) as e:
        pipe(PROMPT, seed=3, listeners=[at_step(index, press)])
    assert e.value.state["step"] > index
    assert same(pipe.run(e.value.state).state, whole)
    assert channel.process_id == pid, "it went on living"


def test_the_command_line_says_where_each_stage_ran(call, model):
    words = ["--model", model, "--placement", "denoise=process", "--no-sheet", "--seed", 3]
    there = call("generate", PROMPT, *words, "--out", "a.npz", "--json")
    assert there.code == 0, there.err
    assert "place  denoise at process: " in there.err
    assert "kB back" in there.err
    told = json.loads(there.out)
    assert told["places"] == {"encode_text": ["here"], "denoise": ["process"], "decode_latents": ["here"]}
    (trip,) = told["travelled"]
    assert (trip["stage"], trip["place"]) == ("denoise", "process")
    assert 0 < trip["sent"] < trip["received"]
    assert told["retries"] == []
    here = call("generate", PROMPT, "--model", model, "--no-sheet", "--seed", 3, "--out", "b.npz", "--json")
    assert json.loads(here.out)["output_sha256"] == told["output_sha256"]
    assert "place " not in here.err


@linux
def test_ctrl_c_in_a_terminal_reaches_the_parent_alone(model, tmp_path):
    """A terminal sends it to the whole group of processes; the child goes on until it is told to stop."""
    words = [sys.executable, "-m", "ditkit", "generate", PROMPT, "--model", str(model), "--steps", "1000",
             "--placement", "denoise=process", "--out", "a.npz", "--no-sheet"]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(words, cwd=tmp_path, env=alone(), start_new_session=True, **pipes)
    try:
        for line in run.stdout:
            if line.startswith("step "):
                break
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        threads = [p.read_text().split() for p in Path(f"/proc/{run.pid}/task").glob("*/children")]
        (child,) = {*children, *(pid for some in threads for pid in some)}
        os.killpg(run.pid, signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, err
    assert "error: interrupted in denoise after step " in err
    state = ditkit.State.load(tmp_path / "a.state.safetensors")
    assert 0 < state["step"] < 1000
    assert ended(int(child))

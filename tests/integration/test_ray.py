"""Stages in Ray actors: on a cluster that is started for them, on one that is there, and through ``ray://``.

That they compute the same is shown in test_every_placement. GPUs in actors are not tested.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from acting import at_step, same
from safetensors.torch import save_file
from shell import alone

import ditkit
from ditkit.errors import LoadError, PlaceError, SetupError
from ditkit.placement.ray import CLUSTER, RayChannel
from ditkit.placement.spec import Spec

ray = pytest.importorskip("ray")
PROMPT = "a red circle"
LONG = 200  # steps of a run that is still at work when its actor is told to end


def placed(model, kind="ray", **setup):
    pipe = ditkit.load(model, placement={"denoise": kind}, **setup)
    channel = pipe.places.remote(Spec.parse(kind)).channel
    assert isinstance(channel, RayChannel)
    return pipe, channel


@pytest.fixture(scope="module")
def whole(tiny_model):
    return ditkit.load(tiny_model)(PROMPT, seed=3).state


@pytest.fixture(scope="module")
def long(tiny_model):
    return ditkit.load(tiny_model)(PROMPT, seed=3, steps=LONG).state


@pytest.fixture(scope="module")
def shared(tiny_model):
    """A pipe with an actor on a cluster that was started for it, which ends with it."""
    assert not ray.is_initialized()
    pipe, channel = placed(tiny_model)
    channel.ask("describe")
    yield pipe, channel
    pipe.places.close()
    assert not ray.is_initialized()


def test_an_actor_that_dies_is_replaced_and_the_run_is_the_same(shared, long):
    pipe, channel = shared
    before = channel._actor
    result = pipe(PROMPT, seed=3, steps=LONG, listeners=[at_step(0, lambda: ray.kill(channel._actor))])
    assert same(result.state, long)
    assert channel._actor not in (None, before)
    assert "its actor died" in result.receipt["retries"][0]["why"]
    assert ray.is_initialized()


@pytest.mark.parametrize("index", [0, 2, 3])
def test_ctrl_c_keeps_the_state(shared, whole, index):
    def press():
        raise KeyboardInterrupt

    pipe, channel = shared
    actor = channel._started()
    with pytest.raises(ditkit.Interrupted) as e:
        pipe(PROMPT, seed=3, listeners=[at_step(index, press)])
    assert e.value.state["step"] > index
    assert same(pipe.run(e.value.state).state, whole)
    assert channel._actor is actor, "it went on living"


def test_an_actor_of_its_own_for_each_pipe(shared, tiny_model, tmp_path, whole):
    path, name, g = tmp_path / "lora.safetensors", "transformer.blocks.0.attn1.to_q", torch.Generator().manual_seed(1)
    factors = torch.randn(2, 64, generator=g), torch.randn(64, 2, generator=g)
    save_file({f"{name}.lora_A.weight": factors[0], f"{name}.lora_B.weight": factors[1]}, path)
    pipe, _ = placed(tiny_model, "ray:cpu", loras=[str(path)])
    there, here = pipe(PROMPT, seed=3), ditkit.load(tiny_model, loras=[str(path)])(PROMPT, seed=3)
    assert same(there.state, here.state)
    assert there.receipt["places"]["denoise"] == ["ray:cpu"]
    assert not torch.equal(there.state["latents"], whole["latents"])
    pipe.places.close()
    assert same(shared[0](PROMPT, seed=3).state, whole), "the other's actor is as it was"


def test_the_probe_of_an_actor(shared, tiny_model):
    from ditkit.placement.probe import probe_of
    from ditkit.placement.worker import worker_of

    mine = probe_of(worker_of(ditkit.load(tiny_model).setup), "denoise")
    assert shared[1].ask("probe", "denoise")["hash"] == mine["hash"]


def test_what_opening_the_model_raises_there_is_raised_here(shared, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    pipe, channel = placed(folder)
    state = pipe.begin(pipe.model.request({"prompt": PROMPT}))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(LoadError, match=r"at ray\)"):
        pipe.run(state)
    assert channel._actor is None
    pipe.places.close()
    assert ray.is_initialized(), "others use the cluster"


def test_one_cluster_for_each_process(shared, tiny_model):
    pipe, _ = placed(tiny_model, "ray://127.0.0.1:1")
    with pytest.raises(
        PlaceError, match=r"running stages at ray://127.0.0.1:1: this process is connected to a cluster"
    ):
        pipe(PROMPT)


def test_devices_that_an_actor_cannot_have(shared, tiny_model):
    with pytest.raises(SetupError, match="Ray chooses the GPU itself"):
        placed(tiny_model, "ray:cuda:1")
    with pytest.raises(SetupError, match="Write process:mps"):
        placed(tiny_model, "ray:mps")
    if not ray.cluster_resources().get("GPU"):
        pipe, _ = placed(tiny_model, "ray:cuda")
        with pytest.raises(PlaceError, match="Ray finds no GPU on this machine"):
            pipe(PROMPT)
        pipe.places.close()
    assert len(CLUSTER.users) == 1


CLIENT = """
import sys, signal, torch, ditkit
torch.set_num_threads(1)
model, address = sys.argv[1:]
there = ditkit.load(model, placement=dict.fromkeys(("encode_text", "denoise", "decode_latents"), address), threads=1)
here = ditkit.load(model, threads=1)("a red circle", seed=3).state
found = there("a red circle", seed=3)
same = found.state.equal(here) and found.state.fingerprints == here.fingerprints
print("equal", same, found.receipt["places"]["denoise"])
def press(event):
    if event.name == "step.end" and event["step"].index == 1:
        signal.raise_signal(signal.SIGINT)
try:
    there("a red circle", seed=3, listeners=[press])
except ditkit.Interrupted as e:
    print("interrupted", e.state["step"] >= 2, there.run(e.state).state.equal(here))
there.places.close()
"""


@pytest.fixture
def cluster(tmp_path):
    """The address of a cluster that is started as a person would, with a token of its own; and what its users need."""
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, client = free.getsockname()[1], other.getsockname()[1]
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # its sockets want a short name
        words = ["ray", "start", "--head", "--block", f"--port={port}", f"--ray-client-server-port={client}",
                 "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"]  # fmt: skip
        with (tmp_path / "ray.log").open("w+") as log:
            head = subprocess.Popen([Path(sys.executable).parent / words[0], *words[1:]], env=alone() | own, stdout=log,
                                    stderr=log, start_new_session=True)  # fmt: skip
        try:
            yield f"ray://127.0.0.1:{client}", alone() | own
        finally:
            head.send_signal(signal.SIGTERM)
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
                head.wait()


@pytest.mark.slow
def test_a_cluster_that_is_somewhere_else(tiny_model, cluster):
    address, environment = cluster
    run = subprocess.run([sys.executable, "-c", CLIENT, str(tiny_model), address], env=environment, capture_output=True,
                         text=True, timeout=200)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f"equal True ['{address}']" in run.stdout
    assert "interrupted True True" in run.stdout
    assert not re.search(environment["RAY_AUTH_TOKEN"], run.stdout + run.stderr)

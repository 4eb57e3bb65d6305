"""What plugs remember travels: cut anywhere, a run goes on in a child process or at a host to the same bits."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shell import alone

import ditkit
from ditkit import State

FILE = Path(__file__).parents[1] / "remembering.py"
JOB = {"prompt": "a red circle moving left on a black background", "seed": 7, "steps": 8, "guidance_scale": 4.0}
TOKEN = "a-token-of-a-test-0123456789"
pytestmark = pytest.mark.usefixtures("forgotten")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    file = shutil.copy(FILE, tmp_path_factory.mktemp("host"))
    command = [
        sys.executable,
        "-m",
        "ditkit",
        "host",
        "--port",
        "0",
        "--threads",
        "1",
        "--lazy",
        "--plug",
        f"{file}:FirstBlockCache",
    ]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**alone(), "DITKIT_HOST_TOKEN": TOKEN})  # fmt: skip
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    yield line.split()[0]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def pipe(plug: str, **setup):
    return ditkit.load("shapes", threads=1, plugs=[f"{FILE}:{plug}"], **setup)


def begun(loaded) -> State:
    return loaded.begin(loaded.model.request(JOB))


@pytest.mark.parametrize("plug", ["FirstBlockCache:threshold=0.35", "Momentum", "StaleAttention"])
def test_cut_here_and_gone_on_with_elsewhere(host, monkeypatch, tmp_path, plug):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)
    here = pipe(plug)
    whole = here.run(begun(here), until="denoise")
    for place in ("process", host):
        there = pipe(plug, placement={"denoise": place})
        assert there.run(begun(there), until="denoise").state.equal(whole.state)
        for first, second, cut in ((here, there, 3), (there, here, 5), (there, there, 1)):
            half = first.run(begun(first), stop_at_step=cut).state.save(tmp_path / "half.safetensors")
            assert "memory" in State.load(half)
            rest = second.run(State.load(half), until="denoise")
            assert rest.state.equal(whole.state)
            assert rest.state.fingerprints == whole.state.fingerprints


def test_hits_elsewhere_stand_in_the_receipt(host, monkeypatch):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)
    plug = "FirstBlockCache:threshold=0.35"
    counts = [pipe(plug, placement=placement)(**JOB).receipt["plugs"] for placement in ({}, {"denoise": host})]
    assert counts[0] == counts[1]
    assert counts[0]["FirstBlockCache"]["hit"] > 0


def test_a_hand_over_in_the_middle(host, monkeypatch):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)
    plug = "FirstBlockCache:threshold=0.35"
    here = pipe(plug)
    moved = pipe(plug, placement={"denoise": "process", "denoise@4": host})
    whole, parts = (each.run(begun(each), until="denoise").state for each in (here, moved))
    assert parts.equal(whole)
    assert parts.fingerprints == whole.fingerprints

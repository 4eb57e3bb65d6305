"""What really goes over the socket: tensors in their own dtype and size, hardly a byte more; and large bodies, which
uvicorn's messages are too slow for, come whole whatever happens to them."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
from hosting import in_thread

import ditkit
from ditkit.execution.place import Segment
from ditkit.execution.stage import BaseStage
from ditkit.placement.http import zero_copy as straight
from ditkit.placement.http.client import CRC, JOB, HTTPChannel
from ditkit.placement.http.framing import checksum, fresh
from ditkit.placement.http.host import Limits
from ditkit.placement.job import Job, state_to_outcome
from ditkit.placement.remote import Remote
from ditkit.placement.worker import Worker, worker_of
from ditkit.setup import Setup
from ditkit.state import State

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.wire import LOADS, WAYS, Relay, ratios_of_bytes, stages


class Echo(BaseStage):
    name, reads, writes = "echo", ("latents",), ("latents",)

    def run(self, inputs, ctx):
        return {"latents": inputs["latents"]}


@pytest.fixture(scope="module")
def host():
    offered = {"echo": Echo(), **stages(max(load.nbytes for load in LOADS))}
    with in_thread(Worker(offered, {}, {}), limits=Limits(max_bytes=100_000_000)) as host:
        yield host


@pytest.fixture
def filled(monkeypatch):
    """Bytes that went straight to their memory, for each body of which some did."""
    found, fill = [], straight.Straight.fill

    async def count(self, rest, heard):
        found.append(len(rest))
        return await fill(self, rest, heard)

    monkeypatch.setattr(straight.Straight, "fill", count)
    return found


def latents(nbytes):
    generator = torch.Generator().manual_seed(nbytes)
    return torch.randn(1, 1, 1, 1, nbytes // 4, generator=generator)


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_the_bytes_on_the_socket_are_those_of_the_tensors(host, load):
    found = list(ratios_of_bytes(host.url, load))
    assert len(found) == len(WAYS)
    for row in found:
        assert row.met, (row.name, row.ours)
        assert row.ours > 1


def test_embeddings_travel_trimmed_and_in_their_own_dtype(tiny_model):
    """Of a real encoder, to it and on to the loop: neither padding nor a wider dtype."""
    setup = {"model": str(tiny_model), "dtypes": {"text_encoder": "bfloat16"}}
    pipe = ditkit.load(**setup, threads=1)
    state = pipe.begin(pipe.model.request({"prompt": "a red circle " * 200, "negative_prompt": "grey", "steps": 1}))
    with in_thread(worker_of(Setup(**setup))) as host, Relay(host.url) as relay:
        remote = Remote(relay.url, HTTPChannel(relay.url, 60))
        remote.prepare(pipe.stages["encode_text"], [], ditkit.Events())
        relay.up = relay.down = 0
        places = {"encode_text": [Segment(remote)]}
        state = pipe.stages.run(state, pipe.components, places=places, until="encode_text")
        up, down = relay.up, relay.down
    sizes = 0
    for name in ("prompt", "negative_prompt"):
        embeds = state[f"{name}_embeds"]
        assert embeds.dtype == torch.bfloat16
        assert embeds.shape[0] == sum(state[f"{name}_lengths"]), "no row of padding"
        sizes += embeds.numel() * 2
    assert state["negative_prompt_lengths"][0] < 20 < state["prompt_lengths"][0]
    assert sizes < down < 1.3 * sizes, "the tiny encoder is narrow; a real one has 4096 columns"
    assert up < 12_000, "the prompts and the job"


# --- large bodies


@pytest.mark.parametrize("nbytes", [4, 100_000, 1_000_000, 9_000_004, 40_000_000])
def test_it_comes_back_as_it_went(host, filled, nbytes):
    inputs = State({"latents": latents(nbytes)})
    *_, last = HTTPChannel(host.url, 60).submit(Job(f"echo {nbytes}", "echo"), inputs)
    written = state_to_outcome(last.state("it"))[0].written
    assert State(written).equal(inputs)
    if nbytes > 500_000:
        assert filled[0] > nbytes / 2, "most of it went straight"


def post(host, body, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", host.listener.getsockname()[1], timeout=60)
    connection.request("POST", "/stages/echo", body, {JOB: "{}", **dict(headers)})
    return connection, connection.getresponse()


def test_a_connection_can_be_used_again_after_a_large_body(host, filled):
    data = State({"latents": latents(3_000_000)}).to_bytes()
    connection, answer = post(host, data)
    first = answer.read()
    for _ in range(2):
        connection.request("GET", "/health")
        assert connection.getresponse().read().startswith(b"{")
        connection.request("POST", "/stages/echo", data, {JOB: "{}"})
        assert connection.getresponse().read()[-3_000_000:] == first[-3_000_000:] == data[-3_000_000:]
    connection.close()
    assert len(filled) == 3


def test_a_bit_that_changed_in_a_large_body_is_noticed(host):
    data = bytearray(State({"latents": latents(3_000_000)}).to_bytes())
    told = {CRC: f"{checksum([data]):08x}"}
    data[-1] ^= 1
    connection, answer = post(host, bytes(data), told)
    assert answer.status == 400
    assert "changed on the way" in json.loads(answer.read())["found"]
    connection.close()


def test_a_client_that_goes_away_in_a_large_body_leaves_no_job(host, filled):
    connection = socket.create_connection(host.listener.getsockname())
    head = f"POST /stages/echo HTTP/1.1\r\nHost: localhost\r\n{JOB}: {{}}\r\nContent-Length: 50000000\r\n\r\n"
    connection.sendall(head.encode() + bytes(20_000_000))
    assert len(host.jobs.flags) == 1
    connection.close()
    gone = threading.Event()
    for _ in range(600):
        if len(host.jobs.flags) == 0:
            break
        gone.wait(0.05)
    assert len(host.jobs.flags) == 0
    assert len(filled) == 1
    assert HTTPChannel(host.url, 60).ask("health")["jobs"] == 0


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(host):
    connection = socket.create_connection(host.listener.getsockname(), timeout=60)
    head = f"POST /stages/echo HTTP/1.1\r\nHost: localhost\r\n{JOB}: {{}}\r\nContent-Length: 100000001\r\n\r\n"
    connection.sendall(head.encode())
    assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    connection.close()


def test_a_client_that_asks_first_is_told_to_go_on(host):
    """As curl does with all that is larger than a megabyte."""
    data = State({"latents": latents(3_000_000)}).to_bytes()
    connection = socket.create_connection(host.listener.getsockname(), timeout=60)
    head = f"POST /stages/echo HTTP/1.1\r\nHost: localhost\r\n{JOB}: {{}}\r\nConnection: close\r\n"
    connection.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(data)}\r\n\r\n".encode())
    assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
    connection.sendall(data)
    said = b""
    while piece := connection.recv(1 << 20):
        said += piece
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.endswith(data[-3_000_000:])
    connection.close()


def test_fresh_memory_may_be_written_to():
    for size in (0, 5, 5_000_000):
        data = memoryview(fresh(size))
        assert (len(data), data.readonly) == (size, False)

"""What a State costs on its way to a host and back, beside a bare socket that moves the same bytes the same way.

Both ends are processes of this machine, so the bound is the loopback's speed: one connection that stays open, memory
that is fresh and of large pages as ours is, and nothing looked at. Ours is a whole job: a connection of its own, HTTP,
frames, checksums at both ends, a State made and checked. In turns, in one run. Leaves out: networks, which are slower
than all of this; TLS.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.measure import CLOCKS, Row, compared, in_turns

GROUP = "wire, beside a bare socket"

WALL = CLOCKS["wall"]

BARE = """
import socket, struct, sys
import numpy

def receive(connection, size):
    memory = memoryview(numpy.empty(size, numpy.uint8))
    at = 0
    while at < size:
        got = connection.recv_into(memory[at:])
        if not got:
            sys.exit()
        at += got
    return memory

listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection = listener.accept()[0]
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
answer = memoryview(numpy.ones(int(sys.argv[1]), numpy.uint8))
while True:
    up, down = struct.unpack("<QQ", receive(connection, 16))
    receive(connection, up)
    connection.sendall(answer[:down])
"""

HOST = """
import sys
import torch
from ditkit.placement.http.host import Host, bind
from ditkit.placement.worker import Worker
from benchmarks.wire import stages

Host(Worker(stages(int(sys.argv[1])), {}, {}), bind(), announce=lambda url: print(url, flush=True)).serve_here()
"""


@dataclass(frozen=True)
class Load:
    """What travels. ``target``: the largest ratio of the milliseconds. Of small ones the fixed cost of a request, which
    has a row of its own, is the larger part, and no HTTP will meet it: the target stands there all the same."""

    name: str
    field: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: float = 1.3
    bytes_target: float = 1.05

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


LOADS = (
    Load("embeddings, 60 tokens", "prompt_embeds", (60, 4096), torch.bfloat16, 1.3, 1.3),
    Load("embeddings, 512 tokens", "prompt_embeds", (512, 4096), torch.bfloat16, 1.3, 1.3),
    Load("latents, 8.4 MB", "latents", (1, 16, 21, 80, 78), torch.float32),
    Load("latents, 64 MB", "latents", (1, 16, 21, 240, 198), torch.float32),
)
WAYS = ("there", "back", "there and back")


def stages(largest: int) -> dict[str, Any]:
    """A stage for each load and way. ``largest``: bytes of the largest load."""
    from ditkit.execution.stage import BaseStage

    memory = torch.randint(0, 255, (largest,), dtype=torch.uint8)

    class Move(BaseStage):
        def __init__(self, load: Load, way: str):
            self.name, self.load = name_of(load, way), load
            self.reads = (load.field,) if "there" in way else ("prompt_lengths",)
            self.writes = (load.field,) if "back" in way else ("prompt_lengths",)

        def run(self, inputs: Any, ctx: Any) -> dict[str, Any]:
            if self.load.field not in self.writes:
                return {"prompt_lengths": [inputs[self.load.field].shape[0]]}
            return {self.load.field: memory[: self.load.nbytes].view(self.load.dtype).view(self.load.shape)}

    made = [Move(load, way) for load in LOADS for way in WAYS]
    return {stage.name: stage for stage in made}


def name_of(load: Load, way: str) -> str:
    return f"{LOADS.index(load)}-{WAYS.index(way)}"


@contextlib.contextmanager
def child(code: str) -> Iterator[str]:
    """A process that prints where it listens."""
    words = [sys.executable, "-c", code, str(max(load.nbytes for load in LOADS))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def rows(repeats: int) -> Iterator[Row]:
    """By the wall clock: two processes work at the same time."""
    with child(HOST) as url, child(BARE) as port, socket.create_connection(("127.0.0.1", int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for load in LOADS:
            for way in WAYS:
                many = repeats * max(1, 8_000_000 // load.nbytes)
                moves = ours(url, load, way), bare(connection, load, way)
                row = compared(GROUP, f"{load.name}: {way}", "s", *in_turns(*moves, many, WALL))
                yield replace(row, limit=load.target)
        nothing = Load("nothing", "latents", (1, 1, 1, 1, 1), torch.uint8)
        small = (
            ours(url, LOADS[0], "there", torch.zeros(1, 1, dtype=torch.bfloat16)),
            bare(connection, nothing, "there"),
        )
        row = compared(
            GROUP, "a State of no size: the fixed cost of a request", "s", *in_turns(*small, 40, CLOCKS["wall"])
        )
        yield replace(row, limit=None)
        for load in LOADS:
            yield from ratios_of_bytes(url, load)


def ratios_of_bytes(url: str, load: Load) -> Iterator[Row]:
    with Relay(url) as relay:
        for way in WAYS:
            relay.up = relay.down = 0
            ours(relay.url, load, way)()
            tensors = load.nbytes * (2 if way == WAYS[2] else 1)
            ratio = (relay.up + relay.down) / tensors
            name = f"{load.name}: {way}, bytes on the socket both ways / bytes of tensors"
            yield Row(GROUP, name, "x", ratio, limit=load.bytes_target)


def bare(connection: socket.socket, load: Load, way: str) -> Callable[[], None]:
    import numpy

    up, down = (load.nbytes if word in way else 1 for word in ("there", "back"))
    data = memoryview(numpy.ones(up, numpy.uint8))

    def move() -> None:
        connection.sendall(struct.pack("<QQ", up, down))
        connection.sendall(data)
        memory, at = memoryview(numpy.empty(down, numpy.uint8)), 0
        while at < down:
            at += connection.recv_into(memory[at:])

    return move


def ours(url: str, load: Load, way: str, tensor: torch.Tensor | None = None) -> Callable[[], None]:
    from ditkit.placement.http.client import HTTPChannel
    from ditkit.placement.job import Job, state_to_outcome
    from ditkit.state import State

    if tensor is None:
        tensor = torch.randint(0, 255, (load.nbytes,), dtype=torch.uint8).view(load.dtype).view(load.shape)
    there = "there" in way
    inputs = State({load.field: tensor} if there else {"prompt_lengths": [load.shape[0]]})
    channel, number = HTTPChannel(url, 60), itertools.count()

    def move() -> None:
        *_, last = channel.submit(Job(f"{id(number)} {next(number)}", name_of(load, way)), inputs)
        got = state_to_outcome(last.state(url))[0].written
        assert list(got) == [load.field if "back" in way else "prompt_lengths"]

    return move


class Relay:
    """Stands before a host and counts the bytes of its connections: ``up`` to the host, ``down`` from it."""

    def __init__(self, url: str):
        self._host, self.up, self.down = url.removeprefix("http://").rpartition(":"), 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Relay:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # wakes the one that waits
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._connect, args=[self._listener.accept()[0]], daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with near, socket.create_connection((self._host[0], int(self._host[2]))) as far:
            back = threading.Thread(target=self._hand_on, args=(far, near, "down"), daemon=True)
            back.start()
            self._hand_on(near, far, "up")
            back.join()

    def _hand_on(self, here: socket.socket, there: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                there.sendall(data)
        for end in (here, there):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

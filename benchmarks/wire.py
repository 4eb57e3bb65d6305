"""What a State costs on its way to a host and back, beside a bare socket that moves the same bytes.

``python -m benchmarks.wire [REPEATS]``. Both ends are processes of this machine, so the bound is the loopback's speed:
memory that is used again, and nothing looked at. Ours goes through HTTP, lands in fresh memory and is held against its
checksum.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from benchmarks import report
from benchmarks.measure import Row, compared

RAW = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
memory = memoryview(bytearray(int(sys.argv[2])))
while connection.recv(1):
    at = 0
    while at < len(memory):
        at += connection.recv_into(memory[at:])
    connection.sendall(b"1")
"""

HOST = """
import sys
import torch
from ditkit.placement.listen import Host, bind
from ditkit.placement.worker import Worker
from ditkit.stage import BaseStage

class Take(BaseStage):
    name, reads, writes = "take", ("latents",), ("prompt_lengths",)
    def run(self, inputs, ctx):
        return {"prompt_lengths": [inputs["latents"].numel()]}

class Give(BaseStage):
    name, reads, writes = "give", ("prompt_lengths",), ("latents",)
    def run(self, inputs, ctx):
        return {"latents": memory[: inputs["prompt_lengths"][0]].view(1, 1, 1, 1, -1)}

memory = torch.randn(int(sys.argv[1]))
worker = Worker({s.name: s for s in (Take(), Give())}, {}, {})
Host(worker, bind(), announce=lambda url: print(url, flush=True)).serve_here()
"""

LIMIT = 1.3

SIZES = {"512 text rows of UMT5, bf16": 512 * 4096 * 2, "latents of 64 MB": 64_000_000}


def rows(repeats: int) -> Iterator[Row]:
    """Seconds for each way, ours beside the bare socket."""
    largest = max(SIZES.values()) // 4
    host = subprocess.Popen([sys.executable, "-c", HOST, str(largest)], stdout=subprocess.PIPE, text=True)
    try:
        assert host.stdout is not None
        url = host.stdout.readline().strip()
        for name, size in SIZES.items():
            bare = raw(size, repeats)
            for way in ("take", "give"):
                row = compared("wire", f"{name}: {way}", "s", ours(url, way, size // 4, repeats), bare)
                yield replace(row, limit=LIMIT)
    finally:
        host.kill()
        host.communicate()


def raw(size: int, repeats: int) -> list[float]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = [sys.executable, "-c", RAW, str(listener.getsockname()[1]), str(size)]
        with subprocess.Popen(words) as child, listener.accept()[0] as connection:
            data, found = bytes(size), []
            for _ in range(repeats + 1):
                begun = time.perf_counter()
                connection.sendall(b"1")
                connection.sendall(data)
                connection.recv(1)
                found.append(time.perf_counter() - begun)
            connection.close()
            child.wait()
    return found[1:]


def ours(url: str, way: str, numbers: int, repeats: int) -> list[float]:
    import torch

    from ditkit.placement.http import HTTPChannel
    from ditkit.placement.job import Job, state_to_outcome
    from ditkit.state import State

    latents = torch.randn(1, 1, 1, 1, numbers)
    inputs = State({"latents": latents} if way == "take" else {"prompt_lengths": [numbers]})
    channel, found = HTTPChannel(url, 60), []
    for i in range(repeats + 1):
        begun = time.perf_counter()
        *_, last = channel.submit(Job(str(i), way), inputs)
        outcome, _ = state_to_outcome(last.state(url))
        found.append(time.perf_counter() - begun)
        got = outcome.written
        assert got["latents"].numel() == numbers if way == "give" else got["prompt_lengths"] == [numbers]
    return found[1:]


if __name__ == "__main__":
    for row in rows(int(sys.argv[1]) if len(sys.argv) > 1 else 15):
        print(" | ".join(report.cells(row)), flush=True)

"""A host over HTTP: broken heads, lengths, chunks, requests behind each other. It has to answer or to close, and to
answer a sound question afterwards."""

from __future__ import annotations

import contextlib
import socket

from ditkit.placement.worker import worker_of
from ditkit.setup import Setup

from .. import bases
from ..mutate import bytes_mutated, put
from . import wire
from .wire import _read_by

NAMED = ()
ALLOWED = ("socket.connect", "socket.getaddrinfo", "socket.bind")
TOKEN = "a-token-that-nobody-guesses"
PATHS = (
    "/stages/encode_text",
    "/stages/encode_text/probe",
    "/stages",
    "/health",
    "/jobs/x/cancel",
    "/docs",
    "/x",
    "/stages/../x",
)
LENGTHS = (
    b"Content-Length: 1", b"Content-Length:  ", b"Content-Length: 0\r\nContent-Length: ", b"Content-length : ", b"X: ",
    b"Transfer-Encoding: identity\r\nContent-Length: ", b"Expect: 100-continue\r\nContent-Length: ",
    b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: ",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nContent-Length: ",
)  # fmt: skip
HOST = None


def prepare(folder):
    global WORKER, BODY
    wire.PIPE = bases.pipeline(folder, "t2v")
    WORKER = worker_of(Setup(model=str(bases.model(folder, "t2v", "diffusers")), threads=1))
    BODY = _read_by("encode_text", bases.states(folder)[0]).to_bytes()


def _request(rng) -> bytes:
    path = rng.choice(PATHS)
    method = "POST" if path in PATHS[:1] or "cancel" in path else "GET"
    body = BODY if path == PATHS[0] else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Ditkit-Job: {{}}\r\n"
    head += f"Authorization: Bearer {TOKEN}\r\n" if rng.random() < 0.8 else ""
    head += "Accept: application/x-ditkit-frames\r\n" if rng.random() < 0.3 else ""
    if body and rng.random() < 0.25:
        pieces = [body[at : at + 300] for at in range(0, len(body), 300)]
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"".join(
            b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces
        ) + b"0\r\n\r\n"  # fmt: skip
    return (head + (f"Content-Length: {len(body)}\r\n" if method == "POST" else "") + "\r\n").encode() + body


def make(rng, folder) -> str:
    data, how = _request(rng), rng.randrange(6)
    if how < 3:
        head = data[: data.find(b"\r\n\r\n") + 4]
        whole = rng.random() < 0.3
        part = bytes_mutated(rng, data if whole else head, 6)[0]
        data = part + (b"" if whole else data[len(head) :])
    elif how == 3:
        data = data + _request(rng) + _request(rng)
    elif how == 4:
        data = data[: rng.randrange(len(data))]
    else:
        data = data.replace(b"Content-Length: ", rng.choice(LENGTHS))
    put(folder / "data", data)
    return rng.choice(("open", "closed"))


def run(folder, how):
    host = _host()
    with contextlib.suppress(OSError):  # it may close whenever it likes
        _sent(host, (folder / "data").read_bytes(), how == "closed")
    answer = _sent(host, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", False)
    if not answer.startswith(b"HTTP/1.1 200"):
        raise AssertionError(f"it does not answer any more: {answer[:100]!r}")


def _sent(host, data: bytes, closed: bool) -> bytes:
    address, port = host.url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((address, int(port)), timeout=5) as connection:
        connection.settimeout(0.2 if data[:11] != b"GET /health" else 5)
        connection.sendall(data)
        if closed:
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TimeoutError):
            while (piece := connection.recv(1 << 16)) and len(found) < 300:
                found += piece
    return found


def _host():
    """One for each child: it is begun with the first input and ends with the process."""
    global HOST
    if HOST is None:
        import hosting

        keep = hosting.in_thread(WORKER, token=TOKEN)
        HOST = keep.__enter__(), keep
    return HOST[0]

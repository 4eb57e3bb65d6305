"""A host's connections, from one that has no token: heads that do not end cost it nothing and are ended."""

import socket
import time

import pytest
from hosting import in_thread

import ditkit
from ditkit.placement.http import zero_copy
from ditkit.placement.worker import worker_of
from ditkit.setup import Setup

TOKEN = "a-token-of-a-test-0123456789"


@pytest.fixture
def host(model):
    with in_thread(worker_of(Setup(model=str(model), threads=1)), token=TOKEN) as host:
        yield host


def connected(host):
    return socket.create_connection(("127.0.0.1", int(host.url.rpartition(":")[2])), timeout=10)


ENDLESS = {
    "header lines": b"X-A: " + b"b" * 100 + b"\r\n",
    "one value": b"b" * 1000,
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_head_without_an_end_is_ended(host, what):
    sent = 0
    with connected(host) as client:
        client.sendall(b"GET /stages HTTP/1.1\r\nHost: a\r\nX-B: ")
        with pytest.raises(OSError):  # noqa: PT012
            while sent < 64 << 20:
                sent += client.send(ENDLESS[what] * 100)
                time.sleep(0.001)
    assert sent < 16 << 20
    with connected(host) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200" in client.recv(1000)


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET"])
def test_a_head_that_takes_too_long_is_ended(host, monkeypatch, begun):
    monkeypatch.setattr(zero_copy, "PATIENCE", 0.5)
    with connected(host) as client:
        client.sendall(begun)
        got, started = b"", time.monotonic()
        while piece := client.recv(4096):
            got += piece
        assert got.endswith(b"Its head is too large or too slow.")
        assert time.monotonic() - started < 5


def test_a_run_at_a_host_is_no_head(host, model, monkeypatch):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)
    pipe = ditkit.load(model, placement={"denoise": host.url}, threads=1)
    assert pipe("a red circle", steps=2).video.shape[0] == 5

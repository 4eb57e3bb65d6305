"""An answer whose bytes have to come in time, and are not more than were asked for.

The standard library's client waits for each byte as long as for the first one, and reads heads that never end. Here
each part of an answer (its head, its words, a message) has a budget of bytes, and has to keep a pace. Leaves out: what
the bytes mean (``client.py``)."""

import http.client
import io
import socket
import time
from typing import Any

from ditkit.limits import HEAD, SLOWEST


class TooMuch(Exception):
    """A part of an answer has more bytes than anybody needs."""


class Paced(io.RawIOBase):
    """What comes on ``sock``, whose file is ``raw``. ``timeout``: seconds to wait for the first byte of a part."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, timeout: float):
        self._sock, self._raw, self._timeout = sock, raw, timeout
        self.expect(0)

    def expect(self, size: int) -> None:
        """A part of about so many bytes begins: some more come with chunks, and are read ahead."""
        self._most, self._begun, self._received = size + size // 8 + HEAD, time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._begun + self._timeout + self._received / SLOWEST - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(min(left, self._timeout))
        count = self._raw.readinto(buffer)
        self._received += count or 0
        if self._received > self._most:
            raise TooMuch
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class Answer(http.client.HTTPResponse):
    """Made when the request has been sent."""

    def __init__(self, sock: socket.socket, method: str, timeout: float):
        super().__init__(sock, method=method)
        raw: Any = self.fp.detach()
        self.paced = Paced(sock, raw, timeout)
        self.fp = io.BufferedReader(self.paced)

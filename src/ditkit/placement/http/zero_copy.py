"""uvicorn's connection, with large bodies moved straight between the socket and the memory where they shall lie.

On the way through its parser and its messages a body is copied four times, 64 KB at a time, and each answer twice; a
State of 64 MB took five times as long as on a bare socket. Here a body whose length is known is received where it
belongs once its first piece has come, and an answer is written from where its tensors lie. All else is uvicorn's.
A server without this class serves the same, at its own speed. Leaves out: what bodies mean (``host.py``)."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ditkit.limits import CONNECTIONS, HEAD, PATIENCE, SLOWEST, STALLED

NAME = "ditkit.straight"


class Pace:
    """How fast a body has to come: so many bytes a second, after some patience at its beginning. Whoever receives
    counts."""

    def __init__(self) -> None:
        self.begun, self.received = time.monotonic(), 0

    def left(self) -> float:
        """Seconds in which more has to be here."""
        return max(0.0, self.begun + PATIENCE + self.received / SLOWEST - time.monotonic())


class _Filling(asyncio.BufferedProtocol):
    """Stands in for ``owner`` until ``rest`` is full or the connection is lost; then ``ended`` is called."""

    def __init__(
        self, owner: HttpToolsProtocol, rest: memoryview, heard: Callable[[memoryview], Any], ended: Callable[[], None]
    ):
        self.owner, self.rest, self.heard, self.ended = owner, rest, heard, ended

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.rest

    def buffer_updated(self, nbytes: int) -> None:
        self.heard(self.rest[:nbytes])
        self.rest = self.rest[nbytes:]
        if not self.rest:
            self.owner.flow.pause_reading()  # what comes next is not for this memory
            self.ended()

    def pause_writing(self) -> None:
        self.owner.pause_writing()

    def resume_writing(self) -> None:
        self.owner.resume_writing()

    def eof_received(self) -> None:
        self.owner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.connection_lost(exc)
        self.ended()


class Straight(HttpToolsProtocol):
    """For ``uvicorn.Config(http=...)``. A request finds it among its scope's extensions.

    What costs a host something without giving it work is ended: a head that is too large or too slow, a body that drips
    (``Pace``), an answer that nobody takes, and of too many connections the oldest whose request is not ``known``: who
    has the token gets in, however many others hold the door. What has ended gives its memory back."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        number = transport.get_extra_info("socket")
        if number is not None and number.family in (socket.AF_INET, socket.AF_INET6):
            number.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits for 40 ms
        self.known, self.dropped, self.whole = False, False, True
        self.made = self.taken = self.loop.time()
        self.untaken, self.pace = 0, Pace()
        self.ending: asyncio.TimerHandle | None = None
        self._await_head()
        self.watch = self.loop.call_later(STALLED / 4, self._watch)
        self._make_room()

    def _make_room(self) -> None:
        strangers = [e for e in self.connections if isinstance(e, Straight) and not e.known and not e.dropped]
        if len(strangers) > CONNECTIONS:
            oldest = min(strangers, key=lambda each: each.made)
            oldest.dropped = True
            oldest.transport.abort()

    def _await_head(self) -> None:
        self.head_size, self.heading = 0, True
        self.deadline = self.loop.call_later(PATIENCE, self._end_head)

    def _end_head(self) -> None:
        if self.heading and not self.transport.is_closing():
            self.send_400_response("Its head is too large or too slow.")

    def _watch(self) -> None:
        """Ends a connection whose other end has taken nothing of an answer for long."""
        size, now = self.transport.get_write_buffer_size(), self.loop.time()
        if size == 0 or size < self.untaken:
            self.taken = now
        self.untaken = size
        if now - self.taken > STALLED:
            self.transport.abort()
        else:
            self.watch = self.loop.call_later(STALLED / 4, self._watch)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.head_size += len(data)
        if self.head_size > HEAD:
            self._end_head()

    def on_headers_complete(self) -> None:
        self.heading = False
        self.deadline.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self.known = False
        if not self.whole:  # it was refused before it was sent; who goes on sending may do so for a while
            self.ending = self.loop.call_later(PATIENCE, self._end_body, self.cycle)
        super().on_response_complete()

    def _end_body(self, cycle: Any) -> None:
        if self.cycle is cycle and not self.whole:
            self.transport.abort()

    def on_message_complete(self) -> None:
        self.whole = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.deadline.cancel()
        self.watch.cancel()
        if self.ending is not None:
            self.ending.cancel()
        super().connection_lost(exc)
        self.parser = None  # type: ignore[assignment]  # which holds us

    def on_message_begin(self) -> None:
        self.whole = False
        self.deadline.cancel()
        self._await_head()
        super().on_message_begin()
        self.scope["extensions"] = {NAME: self}  # type: ignore[dict-item]

    async def fill(self, rest: memoryview, heard: Callable[[memoryview], Any]) -> bool:
        """All that is to come of the request's body into ``rest``, which is just as large; ``heard`` is called with
        each piece of it. An empty message ends the body then, or the one that says that the client has gone away.
        False: pieces wait to be taken as messages. What comes slower than ``pace`` is ended."""
        if self.cycle.body or not self.cycle.more_body:
            return False
        ended = asyncio.Event()
        self.transport.set_protocol(_Filling(self, rest, heard, ended.set))
        self.flow.resume_reading()
        while not ended.is_set():
            if not (left := self.pace.left()):
                self.transport.abort()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), left or None)
        if not self.transport.is_closing():
            self.transport.set_protocol(self)
            self.parser = httptools.HttpRequestParser(self)  # the old one still waits for the body
            self.cycle.more_body, self.whole = False, True
            self.cycle.message_event.set()
        return True

    async def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Pieces of an answer's body, without a copy. Nothing where the client has gone away."""
        for piece in pieces:
            await self.flow.drain()
            if self.transport.is_closing():
                return
            self.transport.write(piece)


def connection_of(scope: Mapping[str, Any]) -> Straight | None:
    """That of a request, where the server has such ones."""
    return scope.get("extensions", {}).get(NAME)

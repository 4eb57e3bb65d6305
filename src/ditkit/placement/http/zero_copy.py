"""uvicorn's connection, with large bodies moved straight between the socket and the memory where they shall lie.

On the way through its parser and its messages a body is copied four times, 64 KB at a time, and each answer twice; a
State of 64 MB took five times as long as on a bare socket. Here a body whose length is known is received where it
belongs once its first piece has come, and an answer is written from where its tensors lie. All else is uvicorn's.
A server without this class serves the same, at its own speed. Leaves out: what bodies mean (``host.py``)."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

NAME = "ditkit.straight"
HEAD = 64 << 10  # bytes of a request's head; ours have under one thousand
PATIENCE = 20.0  # seconds in which a head has to be complete


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
    """For ``uvicorn.Config(http=...)``. A request finds it among its scope's extensions. A head that is too large or
    too slow ends the connection, and a connection that has ended gives its memory back."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def _await_head(self) -> None:
        self.head_size, self.heading = 0, True
        self.deadline = self.loop.call_later(PATIENCE, self._end_head)

    def _end_head(self) -> None:
        if self.heading and not self.transport.is_closing():
            self.send_400_response("Its head is too large or too slow.")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.head_size += len(data)
        if self.head_size > HEAD:
            self._end_head()

    def on_headers_complete(self) -> None:
        self.heading = False
        self.deadline.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.deadline.cancel()
        super().connection_lost(exc)
        self.parser = None  # type: ignore[assignment]  # which holds us

    def on_message_begin(self) -> None:
        self.deadline.cancel()
        self._await_head()
        super().on_message_begin()
        self.scope["extensions"] = {NAME: self}  # type: ignore[dict-item]

    async def fill(self, rest: memoryview, heard: Callable[[memoryview], Any]) -> bool:
        """All that is to come of the request's body into ``rest``, which is just as large; ``heard`` is called with
        each piece of it. An empty message ends the body then, or the one that says that the client has gone away.
        False: pieces wait to be taken as messages."""
        if self.cycle.body or not self.cycle.more_body:
            return False
        ended = asyncio.Event()
        self.transport.set_protocol(_Filling(self, rest, heard, ended.set))
        self.flow.resume_reading()
        await ended.wait()
        if not self.transport.is_closing():
            self.transport.set_protocol(self)
            self.parser = httptools.HttpRequestParser(self)  # the old one still waits for the body
            self.cycle.more_body = False
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

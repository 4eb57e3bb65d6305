"""What a host answers: messages as a job makes them, its outcome alone, or an error with its status.

The job runs in a thread of its own; what it sends goes through a short queue, so that it waits for a slow reader.
Leaves out: which requests are taken (``host.py``).
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi import Request, Response

from ditkit.errors import DitkitError, PlaceError, StateError, UserError
from ditkit.placement.http.framing import FRAMING, MEDIA_TYPE, PIECE, pack
from ditkit.placement.http.zero_copy import connection_of
from ditkit.placement.job import Message, error_message, error_of
from ditkit.placement.worker import TICK, Send


class Refused(PlaceError):
    """A request that is not taken: 400 it means nothing, 401 who asks is not known, 404 there is no such thing, 413 a
    State is too large, 503 too many jobs wait."""

    def __init__(self, status: int, asked: str, found: str, do: str):
        super().__init__(asked, found, do)
        self.status = status


def refuse(request: Request, error: Exception) -> Response:
    """An error as JSON in its three parts."""
    assert isinstance(error, DitkitError)
    return _error(error, error_message(error))


def _error(error: DitkitError, message: Message) -> Response:
    status = getattr(error, "status", 400 if isinstance(error, UserError) else 500)
    more = {503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
    return Response(bytes(message.payload), status, more, "application/json")


class RunningJob:
    """``work`` in a thread of its own, which is given what takes its messages. ``cancelled`` is set when nobody waits
    for them any more; ``alive``: seconds of silence between signs of life. Made in the event loop that hears of it."""

    def __init__(self, work: Callable[[Send], None], name: str, cancelled: threading.Event, alive: float):
        self.work, self.cancelled, self.alive = work, cancelled, alive
        self._left, self._loop = threading.Event(), asyncio.get_running_loop()
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(4)
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        with contextlib.suppress(_Left):
            try:
                self.work(self._send)
            except StateError as e:
                self._send(error_message(e))
            finally:
                self._send(None)

    def _send(self, message: Message | None) -> None:
        """Waits for room. Raises _Left when nobody takes messages any more."""
        if self._left.is_set():
            raise _Left
        coroutine = self._messages.put(message)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the host has ended
            coroutine.close()
            raise _Left from None
        while True:
            with contextlib.suppress(TimeoutError):
                return future.result(TICK)
            if self._left.is_set():
                future.cancel()
                raise _Left

    async def messages(self) -> AsyncIterator[Message]:
        """As they come, with ``alive`` between them. Whoever stops before the end stops the job."""
        try:
            while True:
                try:
                    message = await asyncio.wait_for(self._messages.get(), self.alive)
                except TimeoutError:
                    message = Message("alive")
                if message is None:
                    return
                yield message
        finally:
            self.cancelled.set()
            self._left.set()

    @contextlib.asynccontextmanager
    async def watched(self, receive: Any) -> AsyncIterator[AsyncIterator[Message]]:
        """``messages``; the job is cancelled when the client goes away."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.cancelled.set()

        watcher = asyncio.create_task(watch())
        try:
            async with contextlib.aclosing(self.messages()) as messages:  # type: ignore[type-var]
                yield messages
        finally:
            watcher.cancel()


class _Left(BaseException):
    """Nobody takes messages any more."""


class MessageStream(Response):
    media_type = MEDIA_TYPE

    def __init__(self, begun: RunningJob):
        super().__init__()
        del self.headers["content-length"]
        self.begun = begun

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self.begun.watched(receive) as messages:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            connection = connection_of(scope)
            async for message in messages:
                if connection is not None and message.nbytes >= PIECE:
                    await connection.write(_chunk(message))
                    continue
                for piece in pack(message):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _chunk(message: Message) -> Iterator[bytes | memoryview]:
    """A message as one chunk of an answer whose length is not known before."""
    yield b"%x\r\n" % (FRAMING + message.nbytes)
    yield from pack(message)
    yield b"\r\n"


async def plain_response(begun: RunningJob, request: Request) -> Response:
    """The outcome as a safetensors file, or the error."""
    last = Message("error")
    async with begun.watched(request.receive) as messages:
        async for message in messages:
            last = message
    if last.kind == "error":
        return _error(error_of(last.payload, "the host"), last)
    return Response(bytes(last.payload), 200, None, "application/octet-stream")

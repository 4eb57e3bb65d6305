"""The host: a Worker behind HTTP. What another machine runs, and on a Unix socket a child process.

A job is a POST with a State as its body; the answer is a stream of messages, or, to whoever asks for none (curl), the
outcome as a State. A client that goes away is noticed, and its job stops at its next event, within a step of a loop.
The job runs in a thread of its own; what it sends goes through a short queue, so that it waits for a slow reader.
Leaves out: what a job does (``worker.py``)."""

import asyncio
import contextlib
import hmac
import itertools
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

from ditkit.allowed import Limits
from ditkit.errors import DitkitError, Lost, MissingDependency, PlaceError, SetupError, StateError, UserError
from ditkit.limits import BACKLOG
from ditkit.placement.http.client import CRC, JOB
from ditkit.placement.http.framing import FRAMING, MEDIA_TYPE, PIECE, crc32, fresh, pack
from ditkit.placement.job import TICK, Job, Message, error_message, error_of, options_to_send
from ditkit.placement.worker import Send, Worker
from ditkit.state import State

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Header, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import Response
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
except ModuleNotFoundError as e:
    do = 'Install it: pip install "ditkit[remote]"'
    raise MissingDependency("offering stages over HTTP", f"{e.name} is not installed", do) from None

from ditkit.placement.http.guard import ERRORS, Guard, Refused, number_of
from ditkit.placement.http.page import POLICY, page_of
from ditkit.placement.http.zero_copy import Pace, Straight, connection_of

BEARER = HTTPBearer(auto_error=False, description="the host's token")
GONE = 60_000  # milliseconds after which a client that confirms nothing that was sent to it counts as gone (Linux)
FAREWELL = 5  # seconds that jobs have to end when the host ends
HOW: Mapping[str, Any] = MappingProxyType({
    "http": Straight, "ws": "none", "lifespan": "off", "log_level": "error", "backlog": BACKLOG,
    "timeout_graceful_shutdown": FAREWELL,
})  # fmt: skip
"""uvicorn's options. What strangers send fills no log."""


def answer_to(error: DitkitError, failed: bool = False) -> Response:
    """An error as JSON in its three parts. ``failed``: by no fault of the client."""
    known = 400 if isinstance(error, UserError) else 503 if isinstance(error, Lost) else 409
    status = getattr(error, "status", 500 if failed or not isinstance(error, UserError | PlaceError) else known)
    more = {503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
    return Response(bytes(error_message(error).payload), status, more, "application/json")


class Jobs:
    """The jobs that are there, by id, with what is set to cancel each: at work, waiting for their turn or still being
    sent. They are admitted in the event loop alone, one at a time; all else may come from any thread."""

    def __init__(self, limits: Limits):
        self.limits, self.flags = limits, dict[str, threading.Event]()

    @contextlib.contextmanager
    def admitted(self, job_id: str) -> Iterator[threading.Event]:
        """What is set to cancel it, until the block ends. Raises Refused."""
        if len(self.flags) > self.limits.queue:
            raise Refused(503, "offering a stage", f"{len(self.flags)} jobs are waiting already", "Try again later")
        if job_id in self.flags:
            raise Refused(409, f"taking job {job_id!r:.100}", "it is here already", "Give each job an id of its own")
        flag = self.flags[job_id] = threading.Event()
        try:
            yield flag
        finally:
            del self.flags[job_id]


def app_of(worker: Worker, *, token: str | None = None, limits: Limits | None = None) -> Guard:
    """``token``: without it only names of this machine are answered to, so that no page of a browser reaches it by a
    name of its own; and nothing but questions is taken without our header, which such a page may not send."""
    from ditkit import __version__

    jobs = Jobs(limits or Limits())
    app = FastAPI(
        title="ditkit host", version=__version__, description="Stages of a diffusion pipeline.", docs_url=None,
        redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.exception_handler(DitkitError)(lambda request, error: answer_to(error))
    app.exception_handler(RequestValidationError)(lambda request, error: answer_to(_misses(error)))
    known = Depends(_knows(token))
    _questions(app, worker, jobs, known)
    _work(app, worker, jobs, known)
    return Guard(app, jobs, any_name=token is not None)


def _misses(error: RequestValidationError) -> Refused:
    where = error.errors()[0]["loc"][-1]
    return Refused(422, "a request", f"it lacks {where}, or holds another thing in it", f"Send {where} (see /docs)")


def _knows(token: str | None) -> Callable[..., Any]:
    async def check(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]
    ) -> None:
        given = credentials.credentials if credentials else ""
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            found = "it came without a token" if credentials is None else "its token is another one"
            raise Refused(401, "a request", found, "Put the host's token into DITKIT_HOST_TOKEN")
        if (connection := connection_of(request.scope)) is not None:
            connection.known = True

    return check


def _questions(app: FastAPI, worker: Worker, jobs: Jobs, known: Any) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page_of(app.openapi()), 200, POLICY, "text/html; charset=utf-8")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """That it is there, and how many jobs are; needs no token."""
        return {"ditkit": app.version, "jobs": len(jobs.flags)}

    @app.get("/stages", dependencies=[known])
    def stages() -> dict[str, Any]:
        """What it offers: stages with their fields, parts with their fingerprints, versions, device."""
        return {**worker.describe(), "limits": jobs.limits.to_tell()}

    @app.get("/stages/{name}/probe", dependencies=[known])
    def probe(name: str, asked: Annotated[str, Header(alias=JOB)]) -> dict[str, Any]:
        """What the stage makes of its fixed input."""
        from ditkit.placement.probe import probe_of

        _offered(worker, name)
        with jobs.admitted(f"probe {uuid.uuid4().hex}") as cancelled:
            return probe_of(worker, name, cancelled)


def _work(app: FastAPI, worker: Worker, jobs: Jobs, known: Any) -> None:
    @app.post("/stages/{name}", dependencies=[known], openapi_extra=_BODY)
    async def run(name: str, request: Request, job: Annotated[str, Header(alias=JOB)]) -> Response:
        """Run a stage. The header is a job as JSON; of ``{}`` everything is filled in. The body is a State with what
        the stage reads; the answer is its outcome, or messages to whoever accepts them."""
        parsed = job_of(job, worker, name)
        with contextlib.ExitStack() as leave:
            cancelled = leave.enter_context(jobs.admitted(parsed.id))
            data = await read_body(request, jobs.limits.max_bytes)
            admission = leave.pop_all()

        def work(send: Send) -> None:
            with admission:
                worker.run(parsed, State.from_buffer(data, "the caller"), send, cancelled, jobs.limits)

        begun = RunningJob(work, f"job {parsed.id}", cancelled, jobs.limits.alive)
        if MessageStream.media_type in request.headers.get("accept", ""):
            return MessageStream(begun)
        return await plain_response(begun, request)

    @app.post("/jobs/{job_id}/cancel", dependencies=[known])
    async def cancel(job_id: str, asked: Annotated[str, Header(alias=JOB)]) -> dict[str, Any]:
        """Stop a job at its next event; what it has is still sent. One that has ended is not missed."""
        if flag := jobs.flags.get(job_id):
            flag.set()
        return {"found": flag is not None}


_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {
    "type": "string", "format": "binary"}}}}}  # fmt: skip


def job_of(text: str, worker: Worker, name: str) -> Job:
    """What the header says, with everything filled in that it leaves out. Raises Refused."""
    whole = {"id": uuid.uuid4().hex, "stage": name, "options": options_to_send(_offered(worker, name))}
    asked, found = f"running stage {name!r}", f"the header {JOB} is no job of this version"
    try:
        job = Job.from_json(json.dumps({**whole, **json.loads(text)}))
    except (PlaceError, ValueError, TypeError, RecursionError):
        raise Refused(400, asked, found, "Send {} or a whole one") from None
    if job.stage != name:
        raise Refused(400, asked, f"the job is for {job.stage!r:.100}", "Name one stage")
    return job


def _offered(worker: Worker, name: str) -> Any:
    if name not in worker.stages:
        raise Refused(404, f"asking for stage {name!r}", f"offered are {', '.join(worker.stages)}", "Name one of them")
    return worker.stages[name]


async def read_body(request: Request, limit: int) -> bytearray | memoryview:
    """The whole body. Raises Refused before and while it comes, StateError where its checksum is another."""
    told, asked, do = request.headers.get("content-length"), "taking a State", "Start with --max-bytes"
    size = int(told) if told and told.isdigit() else 0
    if size > limit:
        raise Refused(413, asked, f"it has {size} bytes and {limit} are allowed", do)
    data, at, crc, connection, pace = fresh(size), 0, 0, connection_of(request.scope), Pace()
    if connection is not None:
        connection.pace = pace

    def hear(piece: bytes | memoryview) -> None:
        nonlocal crc
        pace.received += len(piece)
        crc = crc32(piece, crc)

    async for piece in _in_time(request.stream(), pace):
        if at + len(piece) > limit:
            raise Refused(413, asked, f"it has more than {limit} bytes", do)
        data[at : at + len(piece)] = piece
        at += len(piece)
        hear(piece)
        if connection is not None and at < size and await connection.fill(memoryview(data)[at:], hear):
            at = size
    if request.headers.get(CRC, f"{crc:08x}") != f"{crc:08x}":
        raise StateError(asked, "its content has changed on the way", "Send it again")
    return data


async def _in_time(pieces: AsyncIterator[bytes], pace: Pace) -> AsyncIterator[bytes]:
    """Raises Refused for a body that comes too slowly."""
    while True:
        try:
            async with asyncio.timeout(pace.left()):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise Refused(408, "taking a State", "it comes too slowly", "Look at the network") from None
        if piece is None:
            return
        yield piece


class RunningJob:
    """``work`` in a thread of its own, which is given what takes its messages. ``cancelled`` is set when nobody waits
    for them any more; ``alive``: seconds of silence between signs of life. Made in the event loop that hears of it."""

    def __init__(self, work: Callable[[Send], None], name: str, cancelled: threading.Event, alive: float):
        self.work, self.cancelled, self.alive = work, cancelled, alive
        self.failed = False  # by no fault of the client
        self._left, self._loop = threading.Event(), asyncio.get_running_loop()
        self._ended = False
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(4)
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        with contextlib.suppress(_Left):
            try:
                self.work(self._told)
            except Exception as e:
                self.failed = not isinstance(e, DitkitError)
                if self.failed:
                    ERRORS.error("a job failed", exc_info=e)
                if not self._ended:
                    self._send(error_message(e))
            finally:
                self._send(None)

    def _told(self, message: Message) -> None:
        self._ended = message.last
        self._send(message)

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
                if connection is not None and message.nbytes >= PIECE:  # one chunk of an answer of unknown length
                    length = b"%x\r\n" % (FRAMING + message.nbytes)
                    await connection.write(itertools.chain([length], pack(message), [b"\r\n"]))
                    continue
                for piece in pack(message):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def plain_response(begun: RunningJob, request: Request) -> Response:
    """The outcome as a safetensors file, or the error."""
    last = Message("error")
    async with begun.watched(request.receive) as messages:
        async for message in messages:
            last = message
    if last.kind == "error":
        return answer_to(error_of(last.payload, "the host"), begun.failed)
    return Response(bytes(last.payload), 200, None, "application/octet-stream")


def bind(address: str = "127.0.0.1", port: int = 0, token: str | None = None) -> socket.socket:
    """A listening socket; port 0 is a free one. Raises SetupError for an address that others reach where there is no
    token, and for one that cannot be had."""
    number = number_of(address)
    if token is None and not (number and number.is_loopback):
        do = "Put one into DITKIT_HOST_TOKEN or give --token-file, or listen at 127.0.0.1"
        raise SetupError(f"listening at {address}", "others reach that address, and there is no token", do)
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((address, port), family=family)
    except (OSError, ValueError) as e:  # a name that is none raises a UnicodeError, which is a ValueError
        asked = f"listening at {address}, port {port}"
        found = "that is no address" if isinstance(e, ValueError) else (e.strerror or str(e)).lower()
        raise SetupError(asked, found, "Choose another one") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # one that died while it sent is noticed, too
    if hasattr(socket, "TCP_KEEPIDLE"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GONE // 2000)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections take it over from the listener
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE)
    return listener


class Host(uvicorn.Server):
    """``announce`` is told its URL once it listens, ``ended`` whether it leaves work that does not end. Options are
    uvicorn's own, such as ssl_keyfile."""

    def __init__(
        self, worker: Worker, listener: socket.socket, token: str | None = None, limits: Limits | None = None,
        announce: Callable[[str], Any] = lambda url: None, ended: Callable[[bool], Any] = lambda left: None,
        **options: Any,
    ):  # fmt: skip
        app = app_of(worker, token=token, limits=limits)
        self.jobs, self.listener, self.announce, self.ended = app.jobs, listener, announce, ended
        super().__init__(uvicorn.Config(app, **HOW, **options))

    @property
    def url(self) -> str:
        address, port = self.listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        return f"{'https' if self.config.is_ssl else 'http'}://{shown}:{port}"

    def serve_here(self) -> None:
        """Until it is told to end."""
        self.run(sockets=[self.listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self.announce(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Jobs are told to end, and what they have is still sent. One whose step takes longer than FAREWELL is left."""
        for server in self.servers:
            server.close()
        for flag in [*self.jobs.flags.values()]:
            flag.set()
        end = time.monotonic() + FAREWELL
        while self.server_state.tasks and time.monotonic() < end:
            await asyncio.sleep(TICK / 2)
        left = bool(self.server_state.tasks)
        for connection in [*self.server_state.connections]:
            connection.transport.abort() if left else connection.shutdown()
        await asyncio.sleep(TICK / 2)
        for task in [*self.server_state.tasks]:
            task.cancel()
        self.ended(left)
        await super().shutdown(sockets)

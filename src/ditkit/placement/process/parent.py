"""A child process: a Worker with memory of its own, which may crash and takes nobody with it.

One child for each place of a Pipeline, started when it is first needed, reached through a Unix socket in a folder that
only this user can open. It ends with ``close``, with the Pipeline, and with this process, however that ends. A crash is
``Lost`` and tells how the child ended; whoever asks next gets a new child. Leaves out: what runs in the child
(``child.py``)."""

import collections
import contextlib
import json
import os
import queue
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ditkit.errors import Lost, PlaceError
from ditkit.placement.http.client import HTTPChannel
from ditkit.placement.job import Job, Message, Question, error_of
from ditkit.setup import Setup
from ditkit.state import State
from ditkit.writing import Scratch

LAST_WORDS = 8  # lines of what a child said on stderr that an error tells
PATH = 100  # bytes that the name of a Unix socket may have: 104 with its end on a Mac, 108 on Linux
START = (
    30.0  # seconds without a sign of life, at least, until a starting child counts as hanging: imports stop all else
)


@dataclass(frozen=True)
class Child:
    """``words``: its last lines on stderr, which the thread ``nurse`` reads. ``leave``: removes its folder."""

    process: subprocess.Popen[bytes]
    channel: HTTPChannel
    folder: Scratch
    words: Sequence[str]
    nurse: threading.Thread

    def fate(self) -> str | None:
        """How it ended; None while it lives. It may need a moment to end after its socket is closed."""
        try:
            code = self.process.wait(2)
        except subprocess.TimeoutExpired:
            return None
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        self.nurse.join(1)  # words may still be on their way; a process that it started may hold the stream
        said = f" and said: {' | '.join(self.words)}" if self.words else ""
        return f"its process ended with {how}{said}"

    def end(self) -> None:
        """It ends itself when its stdin is closed, and is killed where it does not. May be called twice."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.folder.close()


class ProcessChannel:
    """``device``: that of the child, None for those of the Setup. ``stages``: those that it shall offer. As many CPU
    threads as this process has, so that both compute the same bits.

    Raises PlaceError on Windows, where Python has no Unix sockets."""

    def __init__(self, setup: Setup, device: str | None, stages: Sequence[str]):
        self.name = "process" if device is None else f"process:{device}"
        if not hasattr(socket, "AF_UNIX"):
            found = "this system has no Unix sockets, which a child is reached through"
            do = "Start `ditkit host` and give its address, http://127.0.0.1:PORT"
            raise PlaceError(f"running stages at {self.name}", found, do)
        moved = {} if device is None else {"device": device, "devices": {}}
        self.setup = setup.model_copy(update={"placement": {}, "expected_probes": {}, **moved})
        self.stages = list(stages)
        self._child: Child | None = None
        self._lock = threading.RLock()

    def ask(self, question: Question, name: str = "") -> dict[str, Any]:
        if question == "cancel" and self._child is None:
            return {}
        with self._reached(f"asking {self.name} for {question} {name}".rstrip()) as channel:
            return channel.ask(question, name)

    def submit(self, job: Job, inputs: State) -> Iterator[Message]:
        with self._reached(f"running stage {job.stage!r} at {self.name}") as channel:
            yield from channel.submit(job, inputs)

    def close(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.end()

    @property
    def process_id(self) -> int | None:
        """Of the child that is there now."""
        return child.process.pid if (child := self._child) else None

    @contextlib.contextmanager
    def _reached(self, asked: str) -> Iterator[HTTPChannel]:
        """The way to the child; one that was lost is ended, also where it lives and does not answer. Raises Lost."""
        child = self._started()
        try:
            yield child.channel
        except Lost as e:
            if (found := child.fate()) is None:
                found = e.found
                child.process.kill()
            with self._lock:
                if self._child is child:
                    self._child = None
            child.end()
            raise Lost(asked, found, "A stage that is killed may need more memory than there is") from None

    def _started(self) -> Child:
        with self._lock:
            if self._child is None:
                child = _born(self.setup, self.stages, self.name)
                weakref.finalize(self, child.end)
                self._child = child
            return self._child


def _born(setup: Setup, stages: Sequence[str], name: str) -> Child:
    """A child that listens. Raises Lost when it ends before that, and what opening the model raises there."""
    import torch

    folder, token = Scratch(), secrets.token_urlsafe(32)
    address, asked = folder.path / "child", f"starting a child process for {name}"
    process, words, nurse = _spawned()
    channel = HTTPChannel("http://process", setup.timeout, token=token, uds=str(address))
    child = Child(process, channel, folder, words, nurse)
    try:
        if len(str(address).encode()) > PATH:
            raise PlaceError(asked, f"the name {address} is too long for a socket", "Set TMPDIR to a shorter one")
        told = {"setup": setup.model_dump(mode="json"), "stages": list(stages), "threads": torch.get_num_threads()}
        told |= {"socket": str(address), "token": token, "alive": min(2.0, setup.timeout / 4)}
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()
        said = _line(process.stdout.fileno(), asked, max(START, setup.timeout))
        if not said:
            raise Lost(asked, child.fate() or "it said nothing", "Look at what it said")
        if said != b"\n":
            raise error_of(said, name)
    except BaseException:
        child.end()
        raise
    return child


def _line(file: int, asked: str, timeout: float) -> bytes:
    """What a child says after its signs of life; nothing where it has ended. Raises Lost where there is no sign."""
    data = b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while not data.endswith(b"\n"):
            if not selector.select(timeout):
                raise Lost(asked, f"it gave no sign of life in {timeout:g} s", "Look at what this machine waits for")
            if not (piece := os.read(file, 1 << 16)):
                return b""
            data = (data + piece).lstrip(b".")
    return data


def _spawned() -> tuple[subprocess.Popen[bytes], Sequence[str], threading.Thread]:
    """A child in a session of its own, so that Ctrl-C in the terminal is for its parent, and what it says on stderr.

    It is started by a thread that lives as long as it does: Linux ends it with the thread that it was started by."""
    born: queue.Queue[subprocess.Popen[bytes] | BaseException] = queue.Queue()
    words = collections.deque[str](maxlen=LAST_WORDS)

    def nurse() -> None:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:
            command = [sys.executable, "-P", "-m", "ditkit.placement.process.child"]
            process = subprocess.Popen(command, start_new_session=True, **pipes)
        except BaseException as e:
            born.put(e)
            return
        born.put(process)
        assert process.stderr is not None
        with process.stderr as lines:
            words.extend(line.decode(errors="replace").rstrip()[:500] for line in lines)

    thread = threading.Thread(target=nurse, name="ditkit child", daemon=True)
    thread.start()
    if isinstance(found := born.get(), BaseException):
        raise Lost("starting a child process", str(found), "Free some memory")
    return found, words, thread

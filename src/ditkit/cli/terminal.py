"""The terminal: signals that end a run in order, and a line that a person types."""

import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import typer

from ditkit.hiding import hidden, printable

ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


def undisturbed() -> AbstractContextManager[None]:
    """A second Ctrl-C does not break the saving that the first one began."""
    return _handling(signal.SIG_IGN, signal.SIGINT, *ENDINGS)


def interruptible() -> AbstractContextManager[None]:
    """An ending session or a stopped job keeps the State like Ctrl-C; what the caller ignores (nohup) stays ignored."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    return _handling(interrupt, *(s for s in ENDINGS if signal.getsignal(s) == signal.SIG_DFL))


@contextmanager
def _handling(handler: Any, *signals: signal.Signals) -> Iterator[None]:
    """Only the main thread may handle signals; in any other this does nothing."""
    main = threading.current_thread() is threading.main_thread()
    before = {each: signal.signal(each, handler) for each in signals} if main else {}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)


class _PlainLog:
    """A stream whose lines hold no secret and steer no terminal; all else is the stream's."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(hidden(text), keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def plain_log() -> Iterator[None]:
    """What is written on stderr, tracebacks of faults that a stranger's job caused among it, is a plain log."""
    before, log = sys.stderr, _PlainLog(sys.stderr)
    sys.stderr = log
    try:
        yield
    finally:
        if sys.stderr is log:
            sys.stderr = before


def line(question: str) -> str:
    """What is typed until Enter. Raises typer.Abort on Ctrl-C and where the terminal ends.

    ``input`` waits in C: a Ctrl-C that comes just before it does so is only seen after the next Enter. Here a signal
    wakes the waiting, whenever it comes."""
    print(f"{question}: ", end="", flush=True)
    try:
        text = sys.stdin.readline() if sys.platform == "win32" else _typed(sys.stdin.fileno())
    except KeyboardInterrupt:
        text = ""
    if not text:
        print()
        raise typer.Abort
    return text.rstrip("\r\n")


def _typed(terminal: int) -> str:
    """A terminal gives one line at a time. It is read past Python's buffer, of which nobody could tell what waits."""
    with _woken() as signals, selectors.DefaultSelector() as waiting:
        waiting.register(terminal, selectors.EVENT_READ)
        waiting.register(signals, selectors.EVENT_READ)
        while terminal not in {key.fd for key, _ in waiting.select()}:
            signals.recv(4096)  # the handlers have run by now; one that raised has ended this
    return os.read(terminal, 1 << 16).decode(sys.stdin.encoding, "replace")


@contextmanager
def _woken() -> Iterator[socket.socket]:
    """A socket that can be read after each signal. Only the main thread hears of signals."""
    heard, tell = socket.socketpair()
    main = threading.current_thread() is threading.main_thread()
    with heard, tell:
        heard.setblocking(False)
        tell.setblocking(False)
        before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False) if main else -1
        try:
            yield heard
        finally:
            if main:
                signal.set_wakeup_fd(before)

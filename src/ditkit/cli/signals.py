"""Signals of the terminal and the system: which of them end a run in order, and when none may.

Leaves out: what is kept of the run (``resume.py``).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


def undisturbed() -> AbstractContextManager[None]:
    """A second Ctrl-C does not break the saving that the first one began."""
    return handling(signal.SIG_IGN, signal.SIGINT, *ENDINGS)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def interruptible() -> AbstractContextManager[None]:
    """An ending session or a stopped job keeps the State like Ctrl-C; what the caller ignores (nohup) stays ignored."""
    return handling(interrupt, *(s for s in ENDINGS if signal.getsignal(s) == signal.SIG_DFL))


@contextmanager
def handling(handler: Any, *signals: signal.Signals) -> Iterator[None]:
    """Only the main thread may handle signals; in any other this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)

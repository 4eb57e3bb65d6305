"""Seam F: what happens, told to whoever listens.

Listeners only look. An event has a dotted name, a monotonic time and values;
tensors in it are the live ones and must not be written to. There is no global: a run hands its ``Events`` down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Event:
    """``name`` such as ``stage.end`` or ``step.end``; ``seconds`` on a monotonic clock; ``values`` read-only."""

    name: str
    values: Mapping[str, Any]
    seconds: float = field(default_factory=time.perf_counter)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


Listener = Callable[[Event], None]


class Events:
    """Sends each event to each listener, in order, in the thread that emits it."""

    def __init__(self, *listeners: Listener):
        self.listeners = listeners

    def also(self, *listeners: Listener) -> Events:
        return Events(*self.listeners, *listeners)

    def ignored(self) -> list[str]:
        """Names of events that no listener wants: each lists them in an attribute ``ignores``. A stage that runs
        elsewhere does not send them."""
        ignores = [frozenset(getattr(listener, "ignores", ())) for listener in self.listeners]
        return sorted(frozenset.intersection(*ignores)) if ignores else ["prediction", "frames"]

    def emit(self, name: str, /, **values: Any) -> None:
        if self.listeners:
            event = Event(name, MappingProxyType(values))
            for listener in self.listeners:
                listener(event)

    @contextmanager
    def span(self, name: str, **values: Any) -> Iterator[None]:
        """``NAME.start`` now, ``NAME.end`` with its duration in ``elapsed`` seconds when the block ends well."""
        self.emit(f"{name}.start", **values)
        begun = time.perf_counter()
        yield
        self.emit(f"{name}.end", **values, elapsed=time.perf_counter() - begun)


SILENT = Events()

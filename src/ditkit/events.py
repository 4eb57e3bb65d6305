"""Seam F: what happens (``event_table.py``), told to whoever listens.

Listeners only look. An event has a dotted name, a time, values and its place among the spans; tensors in it are the
live ones and must not be written to. There is no global: a run hands its ``Events`` down."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

from ditkit.errors import PipelineError, StateError, noted
from ditkit.event_table import ELSEWHERE, ENDS, EVENTS, fault_of


@dataclass(frozen=True)
class Event:
    """``name`` such as ``stage.end``; ``values`` read-only; ``seconds`` on this process's monotonic clock.

    ``span``: id of the span that it begins or ends, 0 for any other event. ``parent``: id of the span that it happened
    in, 0 outside of all. ``place``: who emitted it. ``sent``: when, on the clock of that place, if not this process."""

    name: str
    values: Mapping[str, Any]
    seconds: float = field(default_factory=time.perf_counter)
    span: int = 0
    parent: int = 0
    place: str = "here"
    sent: float | None = None

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


Listener = Callable[[Event], None]

_IDS = itertools.count(1)
"""Ids of spans, unique in this process: a listener may hear several runs."""

_Open = tuple["Events", int, Any]
_OPEN: ContextVar[_Open | None] = ContextVar("open spans", default=None)
"""Of this thread or task: whose span is open, its id, and what was open before."""


class Events:
    """Sends each event to each listener, in order, in the thread that emits it.

    Threads may share it: ids of spans are unique, and a span lies in the one that its own thread or task opened last.
    A thread that is started inside of a span begins outside of all, unless it runs in ``contextvars.copy_context()``.
    """

    def __init__(self, *listeners: Listener):
        self.listeners = listeners

    @property
    def inside(self) -> int:
        """The id of the span that is open here, 0 outside of all."""
        found = _OPEN.get()
        while found is not None and found[0] is not self:
            found = found[2]
        return 0 if found is None else found[1]

    def ignored(self) -> list[str]:
        """Names of events that no listener wants: each lists them in an attribute ``ignores``. A stage that runs
        elsewhere does not send them. Spans are always sent."""
        if not self.listeners:
            return sorted(name for name, row in EVENTS.items() if ELSEWHERE in row.by and not row.span)
        unwanted = frozenset.intersection(*(frozenset(getattr(each, "ignores", ())) for each in self.listeners))
        return sorted(name for name in unwanted if name.rpartition(".")[2] not in ENDS)

    def emit(self, name: str, /, **values: Any) -> None:
        """Raises PipelineError for an event that is not as the table says."""
        if self.listeners:
            _check(name, values)
            self._tell(name, values, 0, self.inside)

    def send(self, event: Event) -> None:
        """An event that is made already."""
        for listener in self.listeners:
            name = getattr(listener, "__qualname__", type(listener).__qualname__)
            with noted(f"telling the listener {name} of {event.name}"):
                listener(event)

    @contextmanager
    def span(self, name: str, /, **values: Any) -> Iterator[None]:
        """``NAME.start`` now; ``NAME.end`` with ``elapsed`` seconds when the block ends well, else ``NAME.fail``, which
        also says ``error`` (its class), ``why`` (its sentence) and ``outcome``: failed or interrupted."""
        if not self.listeners:
            yield
            return
        _check(f"{name}.start", values)
        span, parent, before, begun = next(_IDS), self.inside, _OPEN.get(), time.perf_counter()
        try:
            self._tell(f"{name}.start", values, span, parent)
            _OPEN.set((self, span, before))
            try:
                yield
            finally:
                _OPEN.set(before)
        except BaseException as e:
            self._tell(f"{name}.fail", {**values, **failure(e, begun)}, span, parent)
            raise
        self._tell(f"{name}.end", {**values, "elapsed": time.perf_counter() - begun}, span, parent)

    def _tell(self, name: str, values: Mapping[str, Any], span: int, parent: int) -> None:
        self.send(Event(name, MappingProxyType(values), span=span, parent=parent))


def _check(name: str, values: Mapping[str, Any]) -> None:
    if found := fault_of(name, values):
        do = "Emit what the table of events has, or a name of your own"
        raise PipelineError(f"emitting the event {name!r}", found, do)


def failure(error: BaseException, begun: float) -> dict[str, Any]:
    """What the end of a failed span that began at ``begun`` has besides its values."""
    stopped = not isinstance(error, Exception) or getattr(error, "exit_code", 0) == 130
    named = {"error": type(error).__name__, "why": str(error) or type(error).__name__}
    return {"elapsed": time.perf_counter() - begun, **named, "outcome": "interrupted" if stopped else "failed"}


class Relay:
    """Hands on the events of another ``place``: its spans get ids of this run and lie in the span that is open now.

    As a context it ends, when it is left, the spans that the place began and did not end."""

    def __init__(self, events: Events, place: str):
        self.events, self.place = events, place
        self._ids, self._open = {0: events.inside}, dict[int, Event]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        why = error or PipelineError(f"a span at {self.place}", "it was not ended there", "Look at its log")
        for begun in reversed(self._open.values()):
            values = MappingProxyType({**begun.values, **failure(why, begun.seconds)})
            name = begun.name.removesuffix("start") + "fail"
            self.events.send(replace(begun, name=name, values=values, seconds=time.perf_counter(), sent=None))
        self._open.clear()

    def check(self, theirs: Event) -> None:
        """Raises StateError for an event that no stage emits, with other values than it has, or that is out of place
        among the spans. ``theirs`` has the ids and the clock of the place."""
        found = fault_of(theirs.name, theirs.values, ELSEWHERE)
        if found or not self._fits(theirs):
            asked = f"reading the event {theirs.name[:40]!r} from {self.place}"
            raise StateError(asked, found or "it does not fit its span", "Look at its log")

    def send(self, theirs: Event) -> None:
        """``theirs``, which was checked, as an event of this run."""
        begun = self._open.pop(theirs.span, None)
        span = self._ids.setdefault(theirs.span, next(_IDS)) if theirs.span else 0
        parent = begun.parent if begun else self._ids[theirs.parent]
        ours = replace(theirs, seconds=time.perf_counter(), place=self.place, sent=theirs.seconds)
        ours = replace(ours, span=span, parent=parent)
        if span and begun is None:
            self._open[theirs.span] = ours
        self.events.send(ours)

    def _fits(self, theirs: Event) -> bool:
        row, (name, _, word) = EVENTS.get(theirs.name), theirs.name.rpartition(".")
        if theirs.parent not in self._ids or (row is not None and row.span != bool(theirs.span)):
            return False
        if word == "start" and theirs.span:
            return theirs.span not in self._ids
        return not theirs.span or (word in ENDS and theirs.span in self._open
                                   and self._open[theirs.span].name == f"{name}.start")  # fmt: skip


SILENT = Events()

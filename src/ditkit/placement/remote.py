"""Remote: a place at the other end of a channel. It sends what a stage may look at, hands on what is heard, and sends
again where the other end was lost; a stage is pure, so that changes nothing.

Leaves out: how bytes travel (a ``Channel``), who may be trusted (``handshake.py``).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ditkit.assembly.seams import texts_of
from ditkit.errors import Lost, PipelineError, PlaceError, StateError
from ditkit.events import Events
from ditkit.execution.place import StageCall, StageResult
from ditkit.execution.stage import Stage
from ditkit.placement.handshake import Handshake, pause, times
from ditkit.placement.job import (
    Job,
    Message,
    frame_to_error,
    frame_to_event,
    options_to_send,
    state_to_outcome,
)
from ditkit.placement.validation import check_event, check_outcome, made_by
from ditkit.receipt import versions
from ditkit.state import State

LOG = "Look at its log"


COMPUTES = ("ditkit", "torch", "transformers")
"""Packages whose version may change the last bits of a result."""


class Channel(Protocol):
    """A way to a Worker. Methods raise Lost when it is not there or stops answering, PlaceError when it refuses."""

    def describe(self) -> dict[str, Any]:
        """What ``Worker.describe`` says."""
        ...

    def probe(self, stage: str) -> dict[str, Any]:
        """What the stage makes of its fixed input (``probe.py``)."""
        ...

    def submit(self, job: Job, inputs: State) -> Iterator[Message]:
        """Frames as they come, the last one an outcome or an error."""
        ...

    def cancel(self, job_id: str) -> None:
        """Stop it at its next event; what it has is still sent."""
        ...

    def close(self) -> None: ...


class Reader:
    """Frames of a channel, read by a thread of their own: a Ctrl-C while waiting breaks nothing, and ``get`` can be
    called again."""

    def __init__(self, submit: Callable[[], Iterator[Message]]):
        self._frames: queue.Queue[Message | BaseException | None] = queue.Queue()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(submit,), daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _read(self, submit: Callable[[], Iterator[Message]]) -> None:
        try:
            frames = submit()
            with contextlib.closing(frames):  # type: ignore[type-var]
                for frame in frames:
                    if self._left.is_set():
                        return
                    self._frames.put(frame)
            self._frames.put(None)
        except BaseException as e:
            self._frames.put(e)

    def get(self) -> Message | None:
        """The next frame, None after the last one. Raises what reading raised."""
        found = self._frames.get()
        if isinstance(found, BaseException):
            raise found
        return found


class Remote:
    """A Place. ``retries``: how often a stage is sent again after its host was lost. ``expect``: probe hashes by stage,
    which the host has to show."""

    def __init__(self, name: str, channel: Channel, retries: int = 2, expect: Mapping[str, str] | None = None):
        self.name, self.channel, self.retries = name, channel, retries
        self.handshake = Handshake(name, channel, expect or {}, retries)

    def prepare(self, stage: Stage, components: Sequence[str], events: Events) -> None:
        self.handshake.check(stage, events)
        if lacking := [name for name in components if name not in self.handshake.fingerprints(stage)]:
            raise PlaceError(f"running stage {stage.name!r} at {self.name}", f"there is no {', '.join(lacking)}",
                             "Start it with a model that has one, or name another place")  # fmt: skip

    def fingerprints(self, stage: Stage, components: Sequence[str]) -> Mapping[str, str]:
        known = self.handshake.fingerprints(stage)
        return {name: known[name] for name in components if name in known}

    def software(self) -> Mapping[str, str]:
        """A result that another torch made must not pass for one of ours: a cache keeps them apart."""
        mine, theirs = versions(), self.handshake.said.get("versions", {})
        return {name: str(theirs.get(name)) for name in COMPUTES if theirs.get(name) != mine.get(name)}

    def run(self, task: StageCall) -> StageResult:
        self.handshake.check(task.stage, task.events)
        if texts_of(task.seams) is None and task.stage.loop:
            raise self._plugged(task)
        state, reached = task.inputs, None
        try:
            for attempt in range(self.retries + 1):
                try:
                    for outcome, final in self._attempt(task, state):
                        if final:
                            return outcome
                        reached = outcome
                    asked = f"running stage {task.stage.name!r} at {self.name}"
                    raise Lost(asked, "it sent no outcome", LOG)
                except Lost as e:
                    if attempt == self.retries:
                        raise PlaceError(e.asked, f"{e.found}{times(attempt)}", e.do) from None
                    told = {"place": self.name, "stage": task.stage.name, "attempt": attempt + 1, "why": str(e)}
                    task.events.emit("place.retry", **told)
                    pause(e, attempt)
                    state = state if reached is None else state.with_fields(reached.written)
        except KeyboardInterrupt:
            if reached is None:
                raise
            return replace(reached, stopped=True)
        raise AssertionError

    def _attempt(self, task: StageCall, inputs: State) -> Iterator[tuple[StageResult, bool]]:
        """What is kept on the way, and then the outcome (True)."""
        stage = task.stage
        job = Job(
            uuid.uuid4().hex,
            stage.name,
            options_to_send(stage),
            dict(task.weights),
            task.stop_at_step,
            task.keep_every if task.keep else None,
            task.events.ignored(),
            made_by(stage),
            texts_of(task.seams) or (),
        )
        begun, received, cancelled = time.perf_counter(), 0, False
        with Reader(lambda: self.channel.submit(job, inputs)) as frames:
            while True:
                try:
                    frame = frames.get()
                    if frame is None:
                        if cancelled:
                            raise KeyboardInterrupt
                        return
                    received += frame.nbytes
                    if frame.kind == "event":
                        name, values = self._event(frame)
                        task.events.emit(name, **values)
                    elif frame.kind == "error":
                        if cancelled:
                            raise KeyboardInterrupt
                        raise frame_to_error(frame.payload, self.name)
                    elif frame.kind in ("kept", "outcome"):
                        outcome, seconds = self._outcome(task, frame)
                        ended = frame.kind == "outcome" and outcome.stopped and not cancelled
                        if frame.kind == "kept" or ended:
                            if task.keep is not None:
                                task.keep(outcome)
                            yield replace(outcome, stopped=False), False
                        if ended:  # not by us: the host was told to end
                            raise Lost(f"running stage {stage.name!r} at {self.name}", "it was ended there", LOG)
                        if frame.kind == "outcome":
                            whole = time.perf_counter() - begun
                            sent = sum(map(len, inputs.buffers()))
                            told = {"sent": sent, "received": received, "worked": seconds}
                            waited = max(0.0, whole - seconds)
                            task.events.emit("travel", stage=stage.name, place=self.name, seconds=waited, **told)
                            # It may have been done before it heard of the Ctrl-C; the run ends here all the same.
                            yield (replace(outcome, stopped=True) if cancelled else outcome), True
                            return
                except Lost:
                    if cancelled:
                        raise KeyboardInterrupt from None
                    raise
                except KeyboardInterrupt:
                    if cancelled:
                        raise
                    cancelled = True
                    with contextlib.suppress(PlaceError):  # then its frames end, too
                        self.channel.cancel(job.id)

    def _event(self, frame: Message) -> tuple[str, dict[str, Any]]:
        with self._theirs():
            name, values = frame_to_event(frame)
            check_event(name, values, self.name)
            return name, values

    def _outcome(self, task: StageCall, frame: Message) -> tuple[StageResult, float]:
        with self._theirs():
            outcome, seconds = state_to_outcome(frame.state(self.name))
            check_outcome(task, outcome, self.name, frame.kind == "outcome" and not outcome.stopped)
        if outcome.plugs is not None and outcome.plugs != task.seams.describe():  # it asked for them, and had none
            raise self._plugged(task)
        return outcome, seconds

    @contextlib.contextmanager
    def _theirs(self) -> Iterator[None]:
        """What is wrong with what came is no fault of ours, and sending the stage again would not change it."""
        try:
            yield
        except (StateError, PipelineError) as e:
            raise PlaceError(e.asked, e.found, f"{self.name} sent that; look at its log") from None

    def _plugged(self, task: StageCall) -> PlaceError:
        return PlaceError(
            f"running stage {task.stage.name!r} at {self.name}",
            f"{', '.join(task.seams.describe())} is changed here by Python objects, which do not travel",
            "Run the stage here, or take them out",
        )

"""Attempt: one stage sent through a channel, and what is done with each message that comes back.

A host may be another version, damaged or of bad will: what it sends is held against what was asked of it before it is
used, kept or written down. Leaves out: how often a stage is sent, and whether what was computed is right, which only
the probe tells (``remote.py``); the bytes themselves (``framing.py``, ``state.py``), and events (``events.py``)."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from ditkit import limits
from ditkit.allowed import UNLIMITED, Limits
from ditkit.cancel import Cancel
from ditkit.checking import check_counts, fault_of
from ditkit.errors import Lost, PipelineError, PlaceError, StateError
from ditkit.events import Relay
from ditkit.execution.place import StageCall, StageResult, checked
from ditkit.execution.stage import known_settings
from ditkit.hiding import printable
from ditkit.identify import forgets
from ditkit.placement.job import LOG, TICK, Channel, Job, Message, error_of, event_of, state_to_outcome


@contextlib.contextmanager
def reading(submit: Callable[[], Iterator[Message]], asked: str) -> Iterator[Callable[[Cancel | None], Message]]:
    """What gives the next message of a channel. They are read by a thread of their own: a Ctrl-C while waiting breaks
    nothing, and it can be called again. It raises what reading raised, Lost after the last message, and
    KeyboardInterrupt on ``cancel``."""
    found: queue.Queue[Message | BaseException] = queue.Queue(limits.MESSAGES_WAITING)
    left, told, seen = threading.Event(), [0], [0]  # bytes that were read, and that were looked at

    def put(what: Message | BaseException, size: int = 0) -> None:
        """Waits for room."""
        told[0] += size
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                if told[0] - seen[0] - size <= limits.WAITING:
                    return found.put(what, timeout=TICK)
                left.wait(TICK)

    def read() -> None:
        try:
            with contextlib.closing(submit()) as messages:  # type: ignore[type-var]
                for count, message in enumerate(messages):
                    if left.is_set():
                        return
                    if count == limits.MESSAGES:
                        raise PlaceError(asked, f"it sent more than {count:,} messages and no outcome", LOG)
                    put(message, message.nbytes)
            raise Lost(asked, "it sent no outcome", LOG)
        except BaseException as e:
            put(e)

    def following(cancel: Cancel | None) -> Message:
        while True:
            if cancel is not None:
                cancel.check()
            with contextlib.suppress(queue.Empty):
                message = found.get(timeout=None if cancel is None else TICK)
                if isinstance(message, BaseException):
                    raise message
                seen[0] += message.nbytes
                return message

    threading.Thread(target=read, daemon=True).start()
    try:
        yield following
    finally:
        left.set()


class Attempt:
    """``place`` is how the place is called, ``limits`` are its own. ``reached``: how far it came, None if nothing was
    kept; a later ``run`` goes on from there."""

    def __init__(self, place: str, channel: Channel, call: StageCall, limits: Limits = UNLIMITED):
        self.place, self.channel, self.call, self.limits = place, channel, call, limits
        self.asked = f"running stage {call.stage.name!r} at {place}"
        self.reached: StageResult | None = None
        self.outcome: StageResult | None = None

    def run(self) -> StageResult:
        """The outcome. Raises Lost, the error that came instead, and KeyboardInterrupt for the second Ctrl-C, or where
        there is no outcome after the first."""
        call = self.call
        if forgets(call.seams.describe()):
            self.reached = None  # what such a plug makes is another result where it is cut: all of it once more
        self.inputs = call.inputs if self.reached is None else call.inputs.with_fields(self.reached.written)
        self.job, self.relay = Job.of(call), Relay(call.events, self.place)
        self.received, self.cancelled = 0, False
        act = {"event": self.on_event, "kept": self.on_kept, "outcome": self.on_outcome, "error": self.on_error}
        self.begun = self.news = time.perf_counter()
        self.limits.check_bytes(sum(map(len, self.inputs.buffers())), self.asked)
        with self.relay, reading(lambda: self.channel.submit(self.job, self.inputs), self.asked) as following:
            while self.outcome is None:
                try:
                    message = following(None if self.cancelled else call.cancel)
                    self.received += message.nbytes
                    self._check_news(message)
                    if message.kind in act:
                        act[message.kind](message)
                except Lost:
                    if self.cancelled:
                        raise KeyboardInterrupt from None
                    raise
                except KeyboardInterrupt:
                    self.cancel()
        # It may have been done before it heard of the Ctrl-C; the run ends here all the same.
        return replace(self.outcome, stopped=self.cancelled)

    def _check_news(self, message: Message) -> None:
        """Raises PlaceError for a host that says for hours that it is at work and nothing else."""
        now = time.perf_counter()
        if message.kind != "alive":
            self.news = now
        elif now - self.news > limits.AT_WORK:
            raise PlaceError(self.asked, f"for {limits.AT_WORK:,.0f} s it has said only that it is at work", LOG)

    def on_event(self, message: Message) -> None:
        with self._theirs():
            event = event_of(message)
            self.relay.check(event)
        self.relay.send(event)

    def on_kept(self, message: Message) -> None:
        outcome = self._result(message)[0]
        step, before = (each.get("step", 0) for each in (outcome.written, self.reached.written if self.reached else {}))
        if self.reached is not None and "step" in outcome.written and step <= before:
            raise PlaceError(self.asked, f"it sent step {step} after step {before}", LOG)
        self._keep(outcome)

    def on_outcome(self, message: Message) -> None:
        outcome, seconds = self._result(message)
        if outcome.stopped and not self.cancelled:  # not by us: the host was told to end
            self._keep(outcome)
            raise Lost(self.asked, "it was ended there", LOG)
        self.outcome = outcome
        waited = max(0.0, time.perf_counter() - self.begun - seconds)
        told = {"sent": sum(map(len, self.inputs.buffers())), "received": self.received, "worked": seconds}
        self.call.events.emit("travel", stage=self.job.stage, place=self.place, seconds=waited, **told)

    def on_error(self, message: Message) -> None:
        raise KeyboardInterrupt if self.cancelled else error_of(message.payload, self.place)

    def cancel(self) -> None:
        """Ask the other end to stop; its messages end, too. Raises KeyboardInterrupt where that was done before."""
        if self.cancelled:
            raise KeyboardInterrupt
        self.cancelled = True
        with contextlib.suppress(PlaceError):
            self.channel.ask("cancel", self.job.id)

    def _keep(self, outcome: StageResult) -> None:
        if self.call.keep is not None:
            self.call.keep(outcome)
        self.reached = replace(outcome, stopped=False)

    def _result(self, message: Message) -> tuple[StageResult, float]:
        with self._theirs():
            outcome, seconds = state_to_outcome(message.state(self.place))
            check_outcome(self.call, outcome, self.place, message.kind == "outcome" and not outcome.stopped)
        if outcome.plugs is not None and outcome.plugs != self.call.seams.describe():  # it asked for them, and had none
            raise plugged(self.asked, self.call)
        return outcome, seconds

    @contextlib.contextmanager
    def _theirs(self) -> Iterator[None]:
        """What is wrong with what came is no fault of ours, and sending the stage again would not change it."""
        try:
            yield
        except (StateError, PipelineError) as e:
            do = f"{self.place} sent that; look at its log"
            raise PlaceError(printable(e.asked), printable(e.found), do) from None


def check_outcome(task: StageCall, outcome: StageResult, place: str, final: bool) -> None:
    """``final``: not one on the way. Raises StateError, and PipelineError for fields that the stage does not write."""
    asked, stage = f"reading what {task.stage.name!r} made at {place}", task.stage
    table, sizes = {**task.table, **{f.name: f for f in stage.fields}}, dict[str, int]()
    before = {name: value for name, value in task.inputs.items() if name not in outcome.written}
    for name, value in before.items():
        if name in table:
            fault_of(table[name], value, sizes)  # what the letters mean in this run
    for name, value in checked(stage, outcome).written.items():
        if name not in table:
            raise StateError(asked, f"nobody asked for {name!r}", LOG)
        if fault := fault_of(table[name], value, sizes):
            raise StateError(asked, f"its field {name!r} is damaged: {fault}", LOG)
    if outcome.plugs and outcome.plugs != task.seams.describe():
        raise StateError(asked, "something else is plugged into its seams there", LOG)
    known = known_settings(task.inputs.get("request", {}))
    for name, value in outcome.settings.items():  # by these a later run judges whether the result is its own
        if name not in known or known[name] != value:
            raise StateError(asked, f"it says that it read the setting {name[:40]!r} as {value!r:.60}", LOG)
    after = task.inputs.with_fields(outcome.written)
    check_counts(after, asked)
    if final and stage.loop and not stage.done(after):
        wanted = max(task.stop_at_step or 0, task.inputs.get("step", 0))
        if task.stop_at_step is None or after.get("step", 0) != wanted:
            found = f"it ended after step {after.get('step', 0)} of {len(after.get('sigmas', [0])) - 1}"
            raise StateError(asked, found, LOG)


def plugged(asked: str, call: StageCall) -> PlaceError:
    seams = ", ".join(call.seams.describe())
    found = f"{seams} is changed here by Python objects, which do not travel"
    return PlaceError(asked, found, "Run the stage here, or take them out")

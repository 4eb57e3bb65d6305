"""Attempt: one stage sent through a channel, and what is done with each message that comes back.

Leaves out: how often a stage is sent (``remote.py``).
"""

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Self

from ditkit.assembly.plugs import texts_of
from ditkit.cancel import Cancel
from ditkit.errors import Lost, PipelineError, PlaceError, StateError
from ditkit.events import Relay
from ditkit.execution.place import StageCall, StageResult
from ditkit.identify import forgets
from ditkit.placement.job import (
    Channel,
    Job,
    Message,
    message_to_error,
    message_to_event,
    options_to_send,
    state_to_outcome,
)  # fmt: skip
from ditkit.placement.validation import check_outcome, made_by

LOG = "Look at its log"
TICK = 0.1
"""Seconds after which whoever waits for a message looks whether it is still wanted."""


class Reader:
    """Messages of a channel, read by a thread of their own: a Ctrl-C while waiting breaks nothing, and ``get`` can be
    called again."""

    def __init__(self, submit: Callable[[], Iterator[Message]], asked: str):
        self._submit, self._asked = submit, asked
        self._messages: queue.Queue[Message | BaseException] = queue.Queue()
        self._left = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _read(self) -> None:
        try:
            messages = self._submit()
            with contextlib.closing(messages):  # type: ignore[type-var]
                for message in messages:
                    if self._left.is_set():
                        return
                    self._messages.put(message)
            raise Lost(self._asked, "it sent no outcome", LOG)
        except BaseException as e:
            self._messages.put(e)

    def get(self, cancel: Cancel | None) -> Message:
        """The next message. Raises what reading raised, Lost after the last one, KeyboardInterrupt on ``cancel``."""
        while True:
            if cancel is not None:
                cancel.check()
            with contextlib.suppress(queue.Empty):
                found = self._messages.get(timeout=None if cancel is None else TICK)
                if isinstance(found, BaseException):
                    raise found
                return found


class Attempt:
    """``place`` is how the place is called. ``reached``: how far it came, None if nothing was kept; a later ``run``
    goes on from there."""

    def __init__(self, place: str, channel: Channel, call: StageCall):
        self.place, self.channel, self.call = place, channel, call
        self.asked = f"running stage {call.stage.name!r} at {place}"
        self.reached: StageResult | None = None

    def _begin(self) -> None:
        call = self.call
        if forgets(call.seams.describe()):
            self.reached = None  # what such a plug makes is another result where it is cut: all of it once more
        self.inputs = call.inputs if self.reached is None else call.inputs.with_fields(self.reached.written)
        self.job = Job(
            uuid.uuid4().hex, call.stage.name, options_to_send(call.stage), dict(call.weights), call.stop_at_step,
            call.keep_every if call.keep else None, call.events.ignored(), made_by(call.stage),
            texts_of(call.seams) or (),
        )  # fmt: skip
        self.relay, self.received, self.cancelled = Relay(call.events, self.place), 0, False
        self.outcome: StageResult | None = None

    def run(self) -> StageResult:
        """The outcome. Raises Lost, the error that came instead, and KeyboardInterrupt for the second Ctrl-C, or where
        there is no outcome after the first."""
        self._begin()
        act = {"event": self.on_event, "kept": self.on_kept, "outcome": self.on_outcome, "error": self.on_error}
        self.begun = time.perf_counter()
        with self.relay, Reader(lambda: self.channel.submit(self.job, self.inputs), self.asked) as messages:
            while self.outcome is None:
                try:
                    message = messages.get(None if self.cancelled else self.call.cancel)
                    self.received += message.nbytes
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

    def on_event(self, message: Message) -> None:
        with self._theirs():
            event = message_to_event(message)
            self.relay.check(event)
        self.relay.send(event)

    def on_kept(self, message: Message) -> None:
        self._keep(self._result(message)[0])

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
        raise KeyboardInterrupt if self.cancelled else message_to_error(message.payload, self.place)

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
            raise PlaceError(e.asked, e.found, f"{self.place} sent that; look at its log") from None


def plugged(asked: str, call: StageCall) -> PlaceError:
    seams = ", ".join(call.seams.describe())
    found = f"{seams} is changed here by Python objects, which do not travel"
    return PlaceError(asked, found, "Run the stage here, or take them out")

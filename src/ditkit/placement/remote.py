"""Remote: a place at the other end of a channel. A stage is sent again where that end was lost; it is pure, so that
changes nothing.

Leaves out: how bytes travel (``channel.py``), one sending (``attempt.py``), who may be trusted (``handshake.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from ditkit.assembly.plugs import texts_of
from ditkit.errors import Lost, PlaceError
from ditkit.events import Events
from ditkit.execution.place import Call, StageCall, StageResult
from ditkit.execution.stage import Stage
from ditkit.identify import forgets
from ditkit.placement.attempt import Attempt, plugged
from ditkit.placement.channel import Channel
from ditkit.placement.handshake import Handshake, pause, times
from ditkit.receipt import versions

COMPUTES = ("ditkit", "torch", "transformers")
"""Packages whose version may change the last bits of a result."""


class Remote:
    """A Place. ``retries``: how often a stage is sent again after its host was lost. ``expected``: probe hashes by
    stage, which the host has to show."""

    def __init__(self, name: str, channel: Channel, retries: int = 2, expected: Mapping[str, str] | None = None):
        self.name, self.channel, self.retries = name, channel, retries
        self.handshake = Handshake(name, channel, expected or {}, retries)

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

    def call(self, task: StageCall) -> Call:
        return Call(partial(self.run, task), lambda result: result)

    def run(self, task: StageCall) -> StageResult:
        self.handshake.check(task.stage, task.events)
        attempt = Attempt(self.name, self.channel, task)
        if texts_of(task.seams) is None and task.stage.loop:
            raise plugged(attempt.asked, task)
        try:
            for count in range(self.retries + 1):
                try:
                    return attempt.run()
                except Lost as e:
                    if count == self.retries:
                        raise PlaceError(e.asked, f"{e.found}{times(count)}", e.do) from None
                    about = {"place": self.name, "stage": task.stage.name, "attempt": count + 1, "why": str(e)}
                    task.events.emit("place.retry", **about)
                    pause(e, count, task.cancel)
                # A plug that cannot save its memory makes another result where it is cut: then all of it once more.
                again = None if forgets(task.seams.describe()) else attempt.reached
                attempt = Attempt(self.name, self.channel, task, again)
        except KeyboardInterrupt:
            if attempt.reached is None:
                raise
            return replace(attempt.reached, stopped=True)
        raise AssertionError

"""Remote: a place at the other end of a channel. Before its first use it is asked who it is: versions, stages,
fingerprints, and the golden probe. A stage is sent again where that end was lost; it is pure, so that changes nothing.

Leaves out: what travels (``job.py``), one sending (``attempt.py``), and the fixed inputs of the probe (``probe.py``).
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ditkit import limits
from ditkit.allowed import Limits
from ditkit.assembly.plugs import texts_of
from ditkit.cancel import Cancel
from ditkit.errors import Lost, PlaceError, nearest
from ditkit.events import SILENT, Events
from ditkit.execution.place import Call, StageCall, StageResult
from ditkit.execution.stage import Stage
from ditkit.hiding import printable
from ditkit.placement.attempt import Attempt, plugged
from ditkit.placement.description import checked_description, checked_probe
from ditkit.placement.job import SAME, Channel, made_by
from ditkit.receipt import versions
from ditkit.request import Request

COMPUTES = ("ditkit", "torch", "transformers")  # packages whose version may change the last bits of a result
T = TypeVar("T")


class Remote:
    """A Place. ``retries``: how often the other end is asked, and a stage sent, again after it was lost. ``expected``:
    probe hashes by stage, which it has to show. It remembers what it was told, and which stages were found in order."""

    def __init__(self, name: str, channel: Channel, retries: int = 2, expected: Mapping[str, str] | None = None):
        self.name, self.channel, self.retries, self.expected = name, channel, retries, expected or {}
        self.described: dict[str, Any] = {}  # what it has said, nothing if it was never asked
        self._checked: set[str] = set()
        self._lock = threading.RLock()

    def prepare(self, stage: Stage, components: Sequence[str], events: Events) -> None:
        self.check(stage, events)
        if lacking := [name for name in components if name not in self._told(stage)["components"]]:
            do = "Start it with a model that has one, or name another place"
            raise PlaceError(self._running(stage), f"there is no {', '.join(lacking)}", do)

    def fingerprints(self, stage: Stage, components: Sequence[str]) -> Mapping[str, str]:
        known = self._told(stage)["components"]
        return {name: known[name] for name in components if name in known}

    def software(self) -> Mapping[str, str]:
        """A result that another torch made must not pass for one of ours: a cache keeps them apart."""
        mine, theirs = versions(), self.description.get("versions", {})
        return {name: str(theirs.get(name)) for name in COMPUTES if theirs.get(name) != mine.get(name)}

    def call(self, task: StageCall) -> Call:
        attempt = Attempt(self.name, self.channel, task)
        return Call(partial(self._run, task, attempt), lambda result: result, reached=lambda: attempt.reached)

    def _run(self, task: StageCall, attempt: Attempt) -> StageResult:
        self.check(task.stage, task.events)
        attempt.limits = self.limits
        if "request" in task.inputs:
            clips = len(task.inputs.get("seed", task.inputs.get("prompt", [0])))
            self.check_limits(task.stage, task.inputs["request"], clips)
        if texts_of(task.seams) is None and task.stage.loop:
            raise plugged(attempt.asked, task)
        try:
            return self._patiently(attempt.run, task.stage.name, task.events, task.cancel)
        except Lost as e:
            raise PlaceError(e.asked, e.found, e.do) from None
        except KeyboardInterrupt:
            if attempt.reached is None:
                raise
            return replace(attempt.reached, stopped=True)

    def _patiently(self, act: Callable[[], T], stage: str, events: Events, cancel: Cancel | None = None) -> T:
        """What ``act`` gives, once more where the other end was lost: after as long as that asks for, or a little
        longer each time. One that was known and takes no connection now may be starting again; RESTART seconds are
        waited for that, and do not count. Raises the last Lost, and KeyboardInterrupt on ``cancel``."""
        attempt, cancel, until = 0, cancel or Cancel(), 0.0
        while True:
            try:
                return act()
            except Lost as e:
                now, lost = time.monotonic(), e
            away = lost.absent and bool(self.described) and self.retries > 0
            if away and not until:
                until = now + limits.RESTART
            elif not away:
                until = 0.0
            if attempt >= self.retries and now >= until:
                times = f" ({attempt + 1} times)" if attempt else ""
                more = f", and it was not there again in {limits.RESTART:g} s" if until else ""
                raise Lost(lost.asked, f"{lost.found}{times}{more}", lost.do)
            if attempt < self.retries:
                attempt += 1
                waits = f" It is waited for, {limits.RESTART:g} s." if until else ""
                events.emit("place.retry", place=self.name, stage=stage, attempt=attempt, why=f"{lost}{waits}")
            cancel.wait(max(lost.after, min(0.1 * 2**attempt, 2.0)))

    @property
    def description(self) -> dict[str, Any]:
        """What the other end says of itself; asked once. Raises Lost, PlaceError."""
        return self._ask(SILENT)

    def _ask(self, events: Events) -> dict[str, Any]:
        """``events`` hears of attempts that failed."""
        with self._lock:
            if not self.described:
                self.described = self._patiently(self._heard, "", events)
            return self.described

    @property
    def limits(self) -> Limits:
        return Limits.told(self.description.get("limits", {}))

    def _heard(self) -> dict[str, Any]:
        return checked_description(self.channel.ask("describe"), self.name)

    def check_limits(self, stage: Stage, request: Mapping[str, Any], clips: int) -> None:
        """Raises RequestError for more than that place does. Nothing is sent for that."""
        self.limits.check(Request.of(request), self._running(stage), clips, stage.together)

    def _told(self, stage: Stage) -> dict[str, Any]:
        """What it says of a stage. Raises PlaceError."""
        stages = self.description["stages"]
        if stage.name not in stages:
            found = printable(f"it offers {', '.join(stages) or 'nothing'}{nearest(stage.name, stages)}")
            raise PlaceError(self._running(stage), found, "Start it with --stages that name this one")
        return stages[stage.name]

    def check(self, stage: Stage, events: Events) -> None:
        """Raises PlaceError with the difference."""
        with self._lock:
            if stage.name in self._checked:
                return
            self._ask(events)
            theirs, running, mine = self._told(stage), self._running(stage), made_by(stage)
            if theirs["version"] != stage.version:
                found = f"its version of the stage is {theirs['version']}, ours is {stage.version}"
                raise PlaceError(running, found, SAME)
            if theirs.get("made_by") != mine:
                found = f"the stage there is {printable(str(theirs.get('made_by'))):.200}, the one here {mine}"
                raise PlaceError(running, found, "Run it here, or offer the same one there")
            wanted = self.expected.get(stage.name, "")
            found = self.probe(stage.name) if wanted else ""
            if not found.startswith(wanted):
                do = "Compare weights, dtype and versions with `ditkit doctor --placement`"
                raise PlaceError(running, f"its probe is {found[:16]}, expected is {wanted[:16]}", do)
            self._checked.add(stage.name)
            events.emit("place.checked", stage=stage.name, place=self.name)

    def probe(self, stage: str) -> str:
        """The hash of what it makes of the stage's fixed input."""
        return checked_probe(self.channel.ask("probe", stage), self.name)

    def _running(self, stage: Stage) -> str:
        return f"running stage {stage.name!r} at {self.name}"

"""Who is at the other end? Asked once before its first use: versions, stages, fingerprints, and the golden probe.

Leaves out: the fixed inputs of the probe (``probe.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ditkit.cancel import Cancel
from ditkit.errors import Lost, PlaceError, nearest
from ditkit.events import SILENT, Events
from ditkit.execution.stage import Stage
from ditkit.placement.channel import Channel
from ditkit.placement.job import SAME, WIRE
from ditkit.placement.validation import made_by
from ditkit.state import SCHEMA


def times(attempt: int) -> str:
    """How often it was tried, for the end of a sentence."""
    return f" ({attempt + 1} times)" if attempt else ""


def pause(lost: Lost, attempt: int, cancel: Cancel | None = None) -> None:
    """Wait before the next attempt: as long as the other end asks for, or a little longer each time. Raises
    KeyboardInterrupt on ``cancel``."""
    (cancel or Cancel()).wait(max(lost.after, min(0.1 * 2**attempt, 5.0)))


class Handshake:
    """Remembers what the other end said, and which stages were found in order. ``retries``: how often it is asked
    again when it was not reached."""

    def __init__(self, place: str, channel: Channel, expected: Mapping[str, str], retries: int = 0):
        self.place, self.channel, self.expected, self.retries = place, channel, expected, retries
        self._said: dict[str, Any] | None = None
        self._checked: set[str] = set()
        self._lock = threading.RLock()

    @property
    def said(self) -> dict[str, Any]:
        """What the other end says of itself; asked once. Raises Lost, PlaceError."""
        return self.ask(SILENT)

    @property
    def heard(self) -> Mapping[str, Any]:
        """What it has said, nothing if it was never asked."""
        return self._said or {}

    def ask(self, events: Events) -> dict[str, Any]:
        """The same as ``said``; ``events`` hears of attempts that failed."""
        with self._lock:
            attempt = 0
            while self._said is None:
                try:
                    self._said = self._versions(self.channel.ask("describe"))
                except Lost as e:
                    if attempt == self.retries:
                        raise Lost(e.asked, f"{e.found}{times(attempt)}", e.do) from None
                    attempt += 1
                    events.emit("place.retry", place=self.place, stage="", attempt=attempt, why=str(e))
                    pause(e, attempt - 1)
            return self._said

    def _versions(self, said: dict[str, Any]) -> dict[str, Any]:
        asked = f"asking {self.place} who it is"
        for what, mine in (("wire", WIRE), ("schema", SCHEMA)):
            if said.get(what) != mine:
                raise PlaceError(asked, f"its {what} version is {said.get(what)!r}, ours is {mine}", SAME)
        stages = said.get("stages")
        facts = [said.get(key) or {} for key in ("versions", "machine", "model", "parts")]
        sound = all(isinstance(known, dict) for known in facts) and all(isinstance(x, dict) for x in facts[3].values())
        if not sound or not isinstance(stages, dict) or not all(map(_is_description, stages.values())):
            raise PlaceError(asked, "its answer is damaged", "Check the address")
        return said

    def fingerprints(self, stage: Stage) -> Mapping[str, str]:
        return self._stage(stage)["components"]

    def _stage(self, stage: Stage) -> dict[str, Any]:
        stages = self.said.get("stages", {})
        if stage.name not in stages:
            found = f"it offers {', '.join(stages) or 'nothing'}{nearest(stage.name, stages)}"
            raise PlaceError(self._running(stage), found, "Start it with --stages that name this one")
        return stages[stage.name]

    def check(self, stage: Stage, events: Events) -> None:
        """Raises PlaceError with the difference."""
        with self._lock:
            if stage.name in self._checked:
                return
            self.ask(events)
            theirs, running = self._stage(stage), self._running(stage)
            if theirs["version"] != stage.version:
                found = f"its version of the stage is {theirs['version']}, ours is {stage.version}"
                raise PlaceError(running, found, SAME)
            if theirs.get("made_by") != made_by(stage):
                found = f"the stage there is {theirs.get('made_by')}, the one here {made_by(stage)}"
                raise PlaceError(running, found, "Run it here, or offer the same one there")
            wanted = self.expected.get(stage.name, "")
            found = self.probe(stage.name) if wanted else ""
            if not found.startswith(wanted):
                raise PlaceError(running, f"its probe is {found[:16]}, expected is {wanted[:16]}",
                                 "Compare weights, dtype and versions with `ditkit doctor --placement`")  # fmt: skip
            self._checked.add(stage.name)
            events.emit("place.checked", stage=stage.name, place=self.place)

    def probe(self, stage: str) -> str:
        """The hash of what it makes of the stage's fixed input."""
        return str(self.channel.ask("probe", stage).get("hash"))

    def _running(self, stage: Stage) -> str:
        return f"running stage {stage.name!r} at {self.place}"


def _is_description(stage: Any) -> bool:
    if not isinstance(stage, dict) or not isinstance(stage.get("version"), int):
        return False
    parts = stage.get("components")
    return isinstance(parts, dict) and all(isinstance(x, str) for pair in parts.items() for x in pair)

"""Who is at the other end? Asked once before its first use: versions, stages, fingerprints, and the golden probe.

Leaves out: the fixed inputs of the probe (``probe.py``).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditkit.cancel import Cancel
from ditkit.errors import Lost, PlaceError, SetupError, nearest
from ditkit.events import SILENT, Events
from ditkit.execution.stage import Stage
from ditkit.placement.job import WIRE
from ditkit.placement.spec import Spec
from ditkit.placement.validation import made_by
from ditkit.state import SCHEMA

if TYPE_CHECKING:
    from ditkit.placement.remote import Channel


def times(attempt: int) -> str:
    """How often it was tried, for the end of a sentence."""
    return f" ({attempt + 1} times)" if attempt else ""


def pause(lost: Lost, attempt: int, cancel: Cancel | None = None) -> None:
    """Before the next attempt: as long as the other end asks for, or a little longer each time. Raises
    KeyboardInterrupt on ``cancel``."""
    (cancel or Cancel()).wait(max(lost.after, min(0.1 * 2**attempt, 5.0)))


class Handshake:
    """Remembers what the other end said, and which stages were found in order. ``retries``: how often it is asked
    again when it was not reached."""

    def __init__(self, place: str, channel: Channel, expect: Mapping[str, str], retries: int = 0):
        self.place, self.channel, self.expect, self.retries = place, channel, expect, retries
        self._said: dict[str, Any] | None = None
        self._checked: set[str] = set()
        self._lock = threading.RLock()

    @property
    def said(self) -> dict[str, Any]:
        """What the other end says of itself; asked once. Raises Lost, PlaceError."""
        return self.ask(SILENT)

    def ask(self, events: Events) -> dict[str, Any]:
        """The same; ``events`` hears of attempts that failed."""
        with self._lock:
            for attempt in range(self.retries + 1):
                if self._said is None:
                    try:
                        self._said = self._versions(self.channel.describe())
                    except Lost as e:
                        if attempt == self.retries:
                            raise Lost(e.asked, f"{e.found}{times(attempt)}", e.do) from None
                        events.emit("place.retry", place=self.place, stage="", attempt=attempt + 1, why=str(e))
                        pause(e, attempt)
            assert self._said is not None
            return self._said

    @property
    def heard(self) -> Mapping[str, Any]:
        """What it has said, nothing if it was never asked."""
        return self._said or {}

    def _versions(self, said: dict[str, Any]) -> dict[str, Any]:
        for what, mine in (("wire", WIRE), ("schema", SCHEMA)):
            if said.get(what) != mine:
                raise PlaceError(
                    f"asking {self.place} who it is", f"its {what} version is {said.get(what)!r}, ours is {mine}",
                    "Use the same version of ditkit on both machines",
                )  # fmt: skip
        stages = said.get("stages")
        facts = [said.get(key) or {} for key in ("versions", "machine", "model", "parts")]
        sound = all(isinstance(known, dict) for known in facts) and all(isinstance(x, dict) for x in facts[3].values())
        if not sound or not isinstance(stages, dict) or not all(map(_is_description, stages.values())):
            raise PlaceError(f"asking {self.place} who it is", "its answer is damaged", "Check the address")
        return said

    def fingerprints(self, stage: Stage) -> Mapping[str, str]:
        return self._stage(stage)["components"]

    def _stage(self, stage: Stage) -> dict[str, Any]:
        stages = self.said.get("stages", {})
        if stage.name not in stages:
            raise PlaceError(
                f"running stage {stage.name!r} at {self.place}",
                f"it offers {', '.join(stages) or 'nothing'}{nearest(stage.name, stages)}",
                "Start it with --stages that name this one",
            )
        return stages[stage.name]

    def check(self, stage: Stage, events: Events) -> None:
        """Raises PlaceError with the difference."""
        with self._lock:
            if stage.name in self._checked:
                return
            self.ask(events)
            theirs = self._stage(stage)
            if theirs["version"] != stage.version:
                raise PlaceError(
                    f"running stage {stage.name!r} at {self.place}",
                    f"its version of the stage is {theirs['version']}, ours is {stage.version}",
                    "Use the same version of ditkit on both machines",
                )
            if theirs.get("made_by") != made_by(stage):
                raise PlaceError(
                    f"running stage {stage.name!r} at {self.place}",
                    f"the stage there is {theirs.get('made_by')}, the one here {made_by(stage)}",
                    "Run it here, or offer the same one there",
                )
            if stage.name in self.expect:
                self._compare(stage.name, self.expect[stage.name])
            self._checked.add(stage.name)
            events.emit("place.checked", stage=stage.name, place=self.place)

    def _compare(self, stage: str, wanted: str) -> None:
        found = str(self.channel.probe(stage).get("hash"))
        if not found.startswith(wanted):
            raise PlaceError(
                f"running stage {stage!r} at {self.place}",
                f"its probe is {found[:16]}, expected is {wanted[:16]}",
                "Compare weights, dtype and versions with `ditkit doctor --placement`",
            )


def _is_description(stage: Any) -> bool:
    if not isinstance(stage, dict) or not isinstance(stage.get("version"), int):
        return False
    parts = stage.get("components")
    return isinstance(parts, dict) and all(isinstance(x, str) for pair in parts.items() for x in pair)


def check_expected(expect: Mapping[str, str], placement: Mapping[str, str]) -> None:
    """``expect`` has the keys of ``placement``, for each its probe's hash or the begin of it. Raises SetupError."""
    for key, wanted in expect.items():
        if key not in placement:
            raise SetupError(
                f"expected_probes of {key!r}", f"it is placed nowhere{nearest(key, placement)}", "Use the same key"
            )
        if Spec.parse(placement[key], key).kind == "here":
            raise SetupError(f"expected_probes of {key!r}", "it runs in this process", "Leave it out")
        if not re.fullmatch("[0-9a-f]{8,64}", wanted):
            raise SetupError(
                f"expected_probes of {key!r} as {wanted!r}", "a probe's hash is 8 to 64 hexadecimal digits",
                "Take it from `ditkit doctor --placement`",
            )  # fmt: skip

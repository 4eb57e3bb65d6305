"""Who is at the other end? Asked once before its first use: versions, stages, fingerprints, and the golden probe.

Leaves out: the fixed inputs of the probe (``probe.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditkit.errors import PlaceError, nearest
from ditkit.events import Events
from ditkit.placement.job import WIRE
from ditkit.stage import Stage
from ditkit.state import SCHEMA

if TYPE_CHECKING:
    from ditkit.placement.remote import Channel


class Handshake:
    """Remembers what the other end said, and which stages were found in order."""

    def __init__(self, place: str, channel: Channel, expect: Mapping[str, str]):
        self.place, self.channel, self.expect = place, channel, expect
        self._said: dict[str, Any] | None = None
        self._checked: set[str] = set()
        self._lock = threading.RLock()

    @property
    def said(self) -> dict[str, Any]:
        """What the other end says of itself; asked once. Raises Lost, PlaceError."""
        with self._lock:
            if self._said is None:
                self._said = self._versions(self.channel.describe())
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
            theirs = self._stage(stage)
            if theirs["version"] != stage.version:
                raise PlaceError(
                    f"running stage {stage.name!r} at {self.place}",
                    f"its version of the stage is {theirs['version']}, ours is {stage.version}",
                    "Use the same version of ditkit on both machines",
                )
            if wanted := self.expect.get(stage.name):
                found = str(self.channel.probe(stage.name).get("hash"))
                if len(wanted) < 8 or not found.startswith(wanted):
                    raise PlaceError(
                        f"running stage {stage.name!r} at {self.place}",
                        f"its probe is {found[:16]}, expected is {wanted[:16]}",
                        "Compare weights, dtype and versions with `ditkit doctor --placement`",
                    )
            self._checked.add(stage.name)
            events.emit("place.checked", stage=stage.name, place=self.place)

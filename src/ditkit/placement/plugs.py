"""Plugs and kernels of a stage that runs elsewhere: is the same code there?

A host says what code it knows besides ditkit's own: files that it was started with and rows of installed packages.
Leaves out: making plugs of what a job names (``assembly/plugs.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ditkit.assembly.plugs import PLUGS, START_WITH, texts_of
from ditkit.contracts import Seams
from ditkit.errors import PlaceError
from ditkit.execution.place import Segment
from ditkit.execution.stage import Stage
from ditkit.placement.remote import Remote
from ditkit.registry import BROUGHT, PlugSpec, Registry
from ditkit.schedulers import SCHEDULERS

FILES = "files"


def codes() -> dict[str, dict[str, str]]:
    """The code that is known here and is not ditkit's own: files by sha256, and for each kind of row its code by name.
    Plain values."""
    files = {sha256: os.path.basename(brought.name) for sha256, brought in BROUGHT.items()}
    return {FILES: files, **{registry.group: registry.codes() for registry in Registry.every}}


def check(
    stages: Iterable[Stage], where: Mapping[str, Sequence[Segment]], seams: Seams, request: Mapping[str, Any]
) -> None:
    """Before anything is computed: every place of a stage that may ask for them knows the plugs, the kernel and the
    scheduler of the run. Raises PlaceError, Lost."""
    for stage in stages:
        needed = _needed(stage, seams, request)
        for place in (segment.place for segment in where.get(stage.name, ())):
            if not needed or not isinstance(place, Remote):
                continue
            known = place.handshake.said.get("code", {})
            for group, name, code in needed:
                if fault := _fault(known.get(group, {}), group, name, code):
                    raise PlaceError(f"running stage {stage.name!r} at {place.name}", fault, START_WITH)


def _needed(stage: Stage, seams: Seams, request: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Kind, name and code of each that is not ditkit's own."""
    if not stage.loop:  # whether another one asks for the seams shows when it runs
        return []
    from ditkit.nn.attention import ATTENTION

    plugs = [PlugSpec.parse(text) for text in texts_of(seams) or ()]
    rows = [(FILES if spec.is_code else PLUGS.group, spec.code, spec.sha256) for spec in plugs]
    kernel, _, code = str(getattr(stage, "attention", "")).partition("@")
    scheduler = str(request.get("scheduler"))
    rows += [(ATTENTION.group, kernel, code), (SCHEDULERS.group, scheduler, SCHEDULERS.code(scheduler))]
    return [row for row in rows if row[2]]


def _fault(known: Mapping[str, str], group: str, name: str, code: str) -> str:
    """Why what is ``known`` there is not the same, or nothing."""
    there = code in known if group == FILES else known.get(name) == code
    other = name in known.values() if group == FILES else name in known
    return "" if there else f"its {name} is other code" if other else f"it does not know {name}"

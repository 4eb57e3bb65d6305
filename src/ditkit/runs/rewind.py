"""A State back to an earlier point: without what some stages made, and without all that was made of that.

Leaves out: what the new run asks for (``fork.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ditkit.execution.stage import Stage, readable, writes_of
from ditkit.execution.stage_list import StageList
from ditkit.state import State


def loop_of(pipeline: StageList) -> int | None:
    """Where the stage stands that takes steps."""
    return next((i for i, stage in enumerate(pipeline.stages) if stage.loop), None)


def taken_back(pipeline: StageList, state: State, names: Collection[str], end: int | None = None) -> State:
    """``state`` without the results of the stages ``names`` and of those that saw them, among the stages before
    ``end``. A stage whose result was overwritten by one of these goes too."""
    stages = pipeline.stages[:end]
    gone = dependents(stages, names)
    while True:
        lost = {name for stage in stages if stage.name in gone for name in writes_of(stage)}
        ran = state.get("stages", [])
        more = {s.name for s in stages if s.name in ran and s.name not in gone and lost & set(writes_of(s))}
        if not more:
            break
        gone = dependents(stages, gone | more)
    state = state.without(*lost)
    left: dict[str, Any] = {"stages": [n for n in state["stages"] if n not in gone]} if "stages" in state else {}
    if "records" in state:
        left["records"] = {n: r for n, r in state["records"].items() if n not in gone}
    return state.with_fields(left)


def dependents(stages: Sequence[Stage], names: Collection[str]) -> set[str]:
    """``names`` and the stages after them that look at what they write, directly or not."""
    gone, changed = set(names), set[str]()
    for stage in stages:
        if stage.name in gone or readable(stage) & changed:
            gone.add(stage.name)
            changed |= set(writes_of(stage))
    return gone

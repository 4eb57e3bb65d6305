"""Which stages a State still needs: why one is skipped, or why its result is out of date.

Leaves out: what a record holds (``records.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ditkit.events import SILENT, Events
from ditkit.execution import records
from ditkit.execution.stage import Stage, writes_of
from ditkit.state import State


def wanted(stages: Sequence[Stage], state: State) -> State:
    """``state`` without what stages wrote that its request does without now."""
    for stage in stages:
        if stage.name in state.get("records", {}) and stage.skip_reason(state):
            kept = {n: r for n, r in state["records"].items() if n != stage.name}
            finished = [n for n in state["stages"] if n != stage.name]
            state = state.without(*writes_of(stage)).with_fields({"records": kept, "stages": finished})
    return state


def outdated(stages: Sequence[Stage], stage: Stage, state: State) -> list[str]:
    """Why the result of ``stage``, one of ``stages``, does not belong to what the State asks for."""
    at = [s.name for s in stages].index(stage.name)
    return records.outdated(stage, state, {name for later in stages[at:] for name in writes_of(later)})


def skip_reason(
    stages: Sequence[Stage], stage: Stage, state: State, asked: bool = False, events: Events = SILENT
) -> str | None:
    """Why ``stage`` does not run now, or None. ``asked``: it runs also if it is done."""
    if why := stage.skip_reason(state):
        return why
    if missing := [name for name in stage.triggers if name not in state]:
        return f"no {', '.join(missing)}"
    if asked or not stage.done(state):
        return None
    if reasons := outdated(stages, stage, state):
        events.emit("stage.outdated", stage=stage.name, reasons=reasons)
        return None
    return "already in the State"

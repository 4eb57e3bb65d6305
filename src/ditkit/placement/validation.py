"""What comes from a place is held against what was asked of it, before anything of it is used, kept or written down.

A host may be another version, damaged or of bad will. Leaves out: whether what it computed is right, which only the
probe tells (``remote.py``), the bytes themselves (``framing.py``, ``state.py``), and events (``events.py``).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from ditkit.checking import check_counts, fault_of
from ditkit.errors import StateError
from ditkit.execution.place import StageCall, StageResult, checked
from ditkit.execution.records import code_of
from ditkit.execution.stage import Stage, known_settings


def made_by(stage: Stage) -> str:
    """The class that carries a stage out, and of one that is not ditkit's own its code too. Both ends of a channel must
    have the same; of a class that is in no file nobody can tell, and then nothing equals it."""
    name = f"{type(stage).__module__}.{type(stage).__qualname__}"
    return name if name.startswith("ditkit.") else f"{name} {code_of(stage) or f'in no file {uuid.uuid4().hex}'}"


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
            raise StateError(asked, f"nobody asked for {name!r}", "Look at its log")
        if fault := fault_of(table[name], value, sizes):
            raise StateError(asked, f"its field {name!r} is damaged: {fault}", "Look at its log")
    if outcome.plugs and outcome.plugs != task.seams.describe():
        raise StateError(asked, "something else is plugged into its seams there", "Look at its log")
    _check_settings(asked, outcome, task.inputs.get("request", {}))
    after = task.inputs.with_fields(outcome.written)
    check_counts(after, asked)
    if final and stage.loop and not stage.done(after):
        wanted = max(task.stop_at_step or 0, task.inputs.get("step", 0))
        if task.stop_at_step is None or after.get("step", 0) != wanted:
            found = f"it ended after step {after.get('step', 0)} of {len(after.get('sigmas', [0])) - 1}"
            raise StateError(asked, found, "Look at its log")


def _check_settings(asked: str, outcome: StageResult, request: Mapping[str, Any]) -> None:
    """They become part of the record, by which a later run judges whether the result is its own."""
    known = known_settings(request)
    for name, value in outcome.settings.items():
        if name not in known or known[name] != value:
            raise StateError(asked, f"it says that it read the setting {name[:40]!r} as {value!r:.60}",
                             "Look at its log")  # fmt: skip

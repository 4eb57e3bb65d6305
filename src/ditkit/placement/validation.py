"""What comes from a place is held against what was asked of it, before anything of it is used, kept or written down.

A host may be another version, damaged or of bad will. Leaves out: whether what it computed is right, which only the
probe tells (``handshake.py``), and the bytes themselves (``framing.py``, ``state.py``).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ditkit.checking import check_counts, fault_of
from ditkit.contracts import Step
from ditkit.errors import StateError
from ditkit.execution.place import StageCall, StageResult, checked
from ditkit.execution.records import code_of
from ditkit.execution.stage import Stage, known_settings
from ditkit.state import kind_of

STEP, NUMBER = {"step": Step}, (int, float)

EVENTS: Mapping[str, Mapping[str, Any]] = {
    "step.start": STEP,
    "step.end": {**STEP, "elapsed": NUMBER},
    "prediction": {**STEP, "x": 5, "velocity": 5},
    "frames": {"frames": 4, "clip": int},
    "load.start": {"component": str},
    "load.end": {"component": str, "elapsed": NUMBER},
    "prompt.truncated": {"field": str, "prompt": str, "tokens": int},
    "prompt.fallback": {"clip": int, "prompt": str, "reason": str},
}
"""Events of ditkit's stages with what listeners count on: of each value its type, of a tensor its dimensions."""

OURS = ("stage", "cache", "place", "travel", "run", "clip")
"""First words of events that only the caller of a stage emits: no place tells where, and whether, a stage ran."""


def made_by(stage: Stage) -> str:
    """The class that carries a stage out, and of one that is not ditkit's own its code too. Both ends of a channel must
    have the same; of a class that is in no file nobody can tell, and then nothing equals it."""
    name = f"{type(stage).__module__}.{type(stage).__qualname__}"
    return name if name.startswith("ditkit.") else f"{name} {code_of(stage) or f'in no file {uuid.uuid4().hex}'}"


def check_event(name: str, values: Mapping[str, Any], place: str) -> None:
    """Raises StateError for an event that no stage emits, or that lacks what belongs to it."""
    told, asked = EVENTS.get(name, {}), f"reading the event {name[:40]!r} from {place}"
    if name.partition(".")[0] in OURS:
        raise StateError(asked, "no stage emits that", "Look at its log")
    for key, wanted in told.items():
        if not _is(values.get(key), wanted):
            raise StateError(asked, f"its {key} is not what belongs there", "Look at its log")


def _is(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, int):
        return kind_of(value) == "tensor" and value.dim() == wanted
    if wanted is not Step:
        return isinstance(value, wanted) and not isinstance(value, bool)
    kinds = {"int": int, "float": NUMBER, "str": str}
    return isinstance(value, Step) and all(_is(getattr(value, f.name), kinds[str(f.type)]) for f in fields(Step))


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

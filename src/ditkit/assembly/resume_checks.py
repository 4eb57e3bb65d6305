"""Whose parts a State was made with, and whether a run may go on with those that are here now.

A State remembers a short identity of each part (``Model.identities``). It belongs to its transformers; any other part
may be exchanged until a stage has used it, and afterwards as long as that stage runs once more. Leaves out: settings
and inputs (``records.py``), and the exact weights of a half-finished loop (``pipeline.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ditkit.assembly.model import Model
from ditkit.errors import StateError
from ditkit.execution.place import Checkpointer
from ditkit.execution.stage_list import Stage, StageList
from ditkit.state import State

EXPERTS = ("transformer", "transformer_2")


def model_field(name: str, model: Model) -> dict[str, Any]:
    """What a State says of its model; of a preview decoder nothing, as no result depends on it."""
    return {"name": name, "parts": {n: i for n, i in model.identities.items() if n != "preview_decoder"}}


def check_begun(state: State, name: str, model: Model, pipeline: StageList, planned: Iterable[Stage]) -> None:
    """``planned``: the stages that will run. Raises StateError that names the parts."""
    begun = state.get("model", {})
    then, now, again = begun.get("parts"), model.identities, {stage.name for stage in planned}
    if then is None:  # an older State knows all of its parts as one
        others = ["one or more parts"] if begun.get("identity", model.identity) != model.identity else []
    else:
        finished = [s for s in pipeline.stages if s.name in state.get("stages", []) and s.name not in again]
        used = dict.fromkeys((*EXPERTS, *(n for stage in finished for n in stage.components)))
        others = [n for n in used if n in then and then[n] != now.get(n, then[n])]
    if not others:
        return
    same = begun.get("name") == name
    found = (
        f"it was begun with other files of it or with other parts: another {' and another '.join(others)}"
        if same
        else f"it was begun with another model, {begun.get('name')}, which has another {' and another '.join(others)}"
    )
    do = "Load it with the same files and parts" if same else "Load that one"
    if then is not None and not {*EXPERTS} & {*others}:
        stages = [s.name for s in pipeline.stages if {*s.components} & {*others} and s.name in state.get("stages", [])]
        do += f", or run it once more from {stages[0]}"
    raise StateError(f"running a State with model {name}", found, do)


def stamped(before: State, after: State, model: Model, pipeline: StageList) -> State:
    """``after`` with the identities of the parts that were at work since ``before``."""
    if "model" not in after:
        return after
    old, new = before.get("records", {}), after.get("records", {})
    ran = [stage for stage in pipeline.stages if new.get(stage.name) != old.get(stage.name)]
    own = {n: model.identities[n] for stage in ran for n in stage.components if n in model.identities}
    begun = after["model"]
    if not own or "parts" not in begun:
        return after
    return after.with_fields({"model": {**begun, "parts": {**begun["parts"], **own}}})


class Stamping:
    """A Checkpointer that tells, with each State, whose parts made it."""

    def __init__(self, keep: Checkpointer, before: State, model: Model, pipeline: StageList):
        self.keep, self.rest = keep, (model, pipeline)
        self.before = before

    @property
    def every(self) -> int:
        return self.keep.every

    def __call__(self, state: State) -> None:
        self.keep(stamped(self.before, state, *self.rest))

    def of_clip(self, index: int) -> Checkpointer:
        return Stamping(self.keep.of_clip(index), self.before, *self.rest)

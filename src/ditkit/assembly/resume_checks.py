"""Whose parts a State was made with, and whether a run may go on with those that are here now.

A State remembers a short identity of each part (``Model.identities``). It belongs to its transformers; any other part
may be exchanged until a stage has used it, and afterwards as long as that stage runs once more. Leaves out: settings
and inputs (``records.py``), and the exact weights of a half-finished loop (``execution.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ditkit.assembly.model import Model
from ditkit.contracts import EXPERTS
from ditkit.errors import StateError
from ditkit.execution.stage_list import Stage, StageList
from ditkit.state import State


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
    another = f"another {' and another '.join(others)}"
    found = f"it was begun with other files of it or with other parts: {another}"
    do = "Load it with the same files and parts"
    if begun.get("name") != name:
        found, do = f"it was begun with another model, {begun.get('name')}, which has {another}", "Load that one"
    if then is not None and not {*EXPERTS} & {*others}:
        stages = [s.name for s in pipeline.stages if {*s.components} & {*others} and s.name in state.get("stages", [])]
        do += f", or run it once more from {stages[0]}"
    raise StateError(f"running a State with model {name}", found, do)

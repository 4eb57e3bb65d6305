"""Which stages make a video with a model: those of its task, and those that are plugged in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditkit.assembly.plugs import stages_of
from ditkit.assembly.stage_rows import STAGES
from ditkit.assembly.tasks import TASKS
from ditkit.execution.stage_list import SOURCES, Stage, StageList

if TYPE_CHECKING:
    from ditkit.assembly.model import Model
    from ditkit.setup import Setup


def stage_of(name: str, model: Model, setup: Setup) -> Stage:
    """One stage by its name, whatever else of ``model`` is on this machine. Raises SetupError."""
    given = next((plug.options for plug in stages_of(setup) if plug.row.name == name), {})
    return STAGES[name].build(model, setup, **given)


def pipeline_of(model: Model, setup: Setup) -> StageList:
    """The stages of ``model``'s task, and the plugged ones beside them. Raises SetupError, PipelineError."""
    task = TASKS[model.task]
    names = [name for name in task.stages if STAGES[name].wanted(model, setup)]
    stages = StageList([stage_of(name, model, setup) for name in names], (*SOURCES, *task.inputs))
    for plug in stages_of(setup):
        row = STAGES[plug.row.name]
        stages = stages.insert(stage_of(row.name, model, setup), before=row.before or None, after=row.after or None)
    return stages

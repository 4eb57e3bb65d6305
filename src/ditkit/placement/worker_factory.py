"""A Worker of a Setup: the model opened, its stages lined up, its parts ready to be loaded.

What a host, a child process and a Ray actor have in common. Leaves out: how jobs reach the Worker.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ditkit.assembly import STAGES, Components, Model, calls_of, pipeline_of, placed, stage_of
from ditkit.assembly.plugs import plugged
from ditkit.checkpoints.model.part import Scope
from ditkit.contracts import Seams
from ditkit.errors import SetupError, nearest
from ditkit.events import SILENT, Events
from ditkit.placement.spec import Target
from ditkit.placement.worker import Worker
from ditkit.registry import known_code
from ditkit.setup import PARTS, Setup
from ditkit.shared import Shared


def worker_of(setup: Setup, stages: Sequence[str] | None = None, shared: Shared | None = None) -> Worker:
    """Offers ``stages``, by default all of the model; of a model of which only the parts of these stages are here, too.

    ``denoise.transformer`` and ``denoise.transformer_2`` are the loop with one of two experts. No weights are loaded.
    Raises LoadError, SetupError."""
    if setup.placement:
        asked = f"offering stages that are placed at {', '.join(sorted(set(setup.placement.values())))}"
        raise SetupError(asked, "what is offered runs here", "Leave placement out")
    setup = placed(setup)
    swaps = plugged(setup, Seams())[0].swaps  # all else that is plugged in comes with the jobs
    if setup.threads is not None:
        import torch

        torch.set_num_threads(setup.threads)
    targets = None if stages is None else [Target.parse(text) for text in stages]
    model = Model.open(setup.model, setup, scope=Scope(None if targets is None else _called(targets)))
    known = {stage.name: stage for stage in pipeline_of(model, setup).stages} if model.task else {}
    names = list(known) if targets is None else list(dict.fromkeys(target.stage for target in targets))
    for name in names if known else ():
        if name not in known:
            found = f"{setup.model} has no such stage{nearest(name, known)}"
            raise SetupError(f"offering the stage {name!r}", found, f"Its stages are {', '.join(known)}")
    components = Components(model, setup, swaps, shared)
    about = {"model": model.describe()["model"], "parts": partial(parts_of, components), "code": known_code()}
    return Worker({name: known.get(name) or stage_of(name, model, setup) for name in names}, components, about)


def _called(targets: Sequence[Target]) -> list[str]:
    """The parts that have to be here for these stages; ``denoise.transformer_2`` is the one expert alone."""
    names: list[str] = []
    for target in targets:
        if target.step is not None or (target.expert and target.expert not in calls_of(target.stage)):
            found = "only an expert of denoise can be offered by itself"
            do = "Name the stage, or denoise.transformer or denoise.transformer_2"
            raise SetupError(f"offering a part of {target.stage}", found, do)
        if target.stage not in STAGES:
            found = f"there is none of that name{nearest(target.stage, STAGES)}"
            raise SetupError(f"offering the stage {target.stage!r}", found, f"The stages are {', '.join(STAGES)}")
        names += [target.expert] if target.expert else calls_of(target.stage)
    return [name for name in dict.fromkeys(names) if name in PARTS]


def parts_of(components: Components) -> dict[str, dict[str, Any]]:
    """What ``Model.describe`` says of each part, and where and how it is computed, with its files' hashes. They are
    read for that, as for the fingerprint."""
    told = components.model.describe()["parts"]
    return {name: {**about, **components.facts(name)} for name, about in told.items()}


def load_all(worker: Worker, events: Events = SILENT) -> None:
    """Load the parts that the offered stages call, so that a damaged file is found now. Raises LoadError."""
    assert isinstance(worker.components, Components)
    components = worker.components.listening(events)
    for name in dict.fromkeys(name for stage in worker.stages.values() for name in stage.components):
        components.get(name)

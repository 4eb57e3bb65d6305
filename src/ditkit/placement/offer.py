"""A Worker of a Setup: the model opened, its stages lined up, its parts ready to be loaded.

What a host, a child process and a Ray actor have in common. Leaves out: how jobs reach the Worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditkit.build import Components, Model, pipeline_of, placed
from ditkit.errors import SetupError, nearest
from ditkit.placement.worker import Worker
from ditkit.setup import Setup
from ditkit.shared import Shared


def worker_of(setup: Setup, stages: Sequence[str] | None = None, shared: Shared | None = None) -> Worker:
    """Offers ``stages``, by default all of the model. No weights are loaded. Raises LoadError, SetupError."""
    if setup.placement:
        raise SetupError(
            f"offering stages that are placed at {', '.join(sorted(set(setup.placement.values())))}",
            "what is offered runs here", "Leave placement out",
        )  # fmt: skip
    setup = placed(setup)
    if setup.threads is not None:
        import torch

        torch.set_num_threads(setup.threads)
    model = Model.open(setup.model, setup)
    known = {stage.name: stage for stage in pipeline_of(model, setup).stages}
    for name in stages or ():
        if name not in known:
            raise SetupError(
                f"offering the stage {name!r}", f"{setup.model} has no such stage{nearest(name, known)}",
                f"Its stages are {', '.join(known)}",
            )  # fmt: skip
    offered = {name: stage for name, stage in known.items() if stages is None or name in stages}
    components = Components(model, setup, shared=shared)
    return Worker(offered, components, {"model": {"name": setup.model}, "parts": parts_of(components)})


def parts_of(components: Components) -> dict[str, dict[str, Any]]:
    """Kind, dtype and device of each part."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in components.model.parts.items():
        found[name] = {"kind": part.kind}
        if part.source is not None:
            dtype, device = components.place(name)
            found[name] |= {"dtype": str(dtype).removeprefix("torch."), "device": device}
    return found


def load_all(worker: Worker) -> None:
    """Load the parts that the offered stages call, so that a damaged file is found now. Raises LoadError."""
    for name in dict.fromkeys(name for stage in worker.stages.values() for name in stage.components):
        worker.components.get(name)

"""ditkit runs diffusion transformers in pieces that you can move, swap and watch.

    import ditkit
    pipe = ditkit.load("shapes")
    pipe("a red circle moving left on a black background", seed=7).save("clip.mp4")

Names are imported when they are first used, so ``import ditkit`` is quick and does not import torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditkit.cancel import Cancel
    from ditkit.contracts import Seams, Site, Step, Swap
    from ditkit.errors import DitkitError
    from ditkit.events import Event, Events
    from ditkit.execution.place import Interrupted
    from ditkit.execution.stage import BaseStage, Context, Stage
    from ditkit.execution.stage_list import StageList
    from ditkit.pipeline import Pipeline, Result, load, switch
    from ditkit.request import Request
    from ditkit.setup import Setup
    from ditkit.state import Field, State

__version__ = "0.1.0"

_HOMES = {
    "load": "pipeline", "switch": "pipeline", "Pipeline": "pipeline", "Result": "pipeline",
    "Request": "request", "Setup": "setup", "State": "state", "Field": "state",
    "StageList": "execution.stage_list", "Stage": "execution.stage",
    "BaseStage": "execution.stage", "Context": "execution.stage",
    "Interrupted": "execution.place",
    "Seams": "contracts", "Swap": "contracts", "Step": "contracts", "Site": "contracts",
    "Event": "events", "Events": "events", "DitkitError": "errors", "Cancel": "cancel",
}  # fmt: skip

__all__ = [
    "BaseStage", "Cancel", "Context", "DitkitError", "Event", "Events", "Field", "Interrupted", "Pipeline", "Request",
    "Result", "Seams", "Setup", "Site", "Stage", "StageList", "State", "Step", "Swap", "load", "switch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ditkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ditkit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})

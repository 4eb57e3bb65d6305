"""Seam E, the solvers: where the noise levels lie and how one step is taken from each to the next.

``make("unipc", order=3)`` gives a scheduler; ``table.step_table`` lays out a run of it. Importing this package does not
import torch: a scheduler's file is opened when it is asked for.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ditkit.errors import RequestError, nearest

if TYPE_CHECKING:
    from ditkit.contracts import Scheduler

SCHEDULERS = MappingProxyType(
    {
        "unipc": "ditkit.schedulers.unipc:UniPC",
        "dpm++": "ditkit.schedulers.dpmpp:DPMpp",
        "dpm++_sde": "ditkit.schedulers.dpmpp:DPMppSDE",
        "euler": "ditkit.schedulers.euler:Euler",
    }
)
"""Name of a scheduler -> where its class stands (``module:class``). The options of a scheduler are the class's
fields."""


def make(name: str, **options: Any) -> Scheduler:
    """The scheduler of that name. An unknown name, option or value of an option is a RequestError."""
    if name not in SCHEDULERS:
        raise RequestError(
            f"scheduler {name!r}", f"unknown{nearest(str(name), SCHEDULERS)}", f"Use one of: {', '.join(SCHEDULERS)}"
        )
    module, _, attribute = SCHEDULERS[name].partition(":")
    scheduler = getattr(import_module(module), attribute)
    known = [option.name for option in fields(scheduler)]
    for option in options:
        if option not in known:
            raise RequestError(
                f"option {option!r} of scheduler {name!r}",
                f"unknown{nearest(option, known)}",
                f"Use one of: {', '.join(known)}" if known else f"{name!r} has no options; leave it out",
            )
    made: Scheduler = scheduler(**options)
    return made

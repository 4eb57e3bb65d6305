"""Seam E, the schedulers: where the noise levels lie and how one step is taken from each to the next.

``make("unipc", order=3)`` gives a scheduler; ``table.step_table`` lays out a run of it. Importing this package does not
import torch: a scheduler's file is opened when it is asked for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ditkit import options
from ditkit.errors import RequestError, nearest
from ditkit.registry import Registry, Row

if TYPE_CHECKING:
    from ditkit.contracts import Scheduler

SCHEDULERS: Registry["SchedulerRow"] = Registry("scheduler", "ditkit.schedulers")


@dataclass(frozen=True)
class SchedulerRow(Row):
    """``make``: the class; its dataclass fields are the request's ``scheduler_options``."""

    name: str
    make: Any
    help: str = ""

    registry: ClassVar[Registry[Any]] = SCHEDULERS


for row in (
    SchedulerRow("unipc", "ditkit.schedulers.unipc:UniPC", "multistep, each step corrected by the next velocity"),
    SchedulerRow("dpm++", "ditkit.schedulers.dpmpp:DPMpp", "DPM-Solver++, multistep"),
    SchedulerRow("dpm++_sde", "ditkit.schedulers.dpmpp:DPMppSDE", "DPM-Solver++ with fresh noise at each step"),
    SchedulerRow("euler", "ditkit.schedulers.euler:Euler", "one step along the velocity"),
):
    SCHEDULERS.add(row, "ditkit")


def make(name: str, **given: Any) -> "Scheduler":
    """The scheduler of that name. An unknown name, option or value of an option is a RequestError."""
    asked = f"scheduler {name!r}"
    if str(name).partition("@")[0] not in SCHEDULERS:
        do = f"Use one of: {', '.join(SCHEDULERS)}, or bring it with --plug FILE.py"
        raise RequestError(asked, f"unknown{nearest(str(name), SCHEDULERS)}", do)
    return options.made(SCHEDULERS[name].made, given, asked, RequestError)

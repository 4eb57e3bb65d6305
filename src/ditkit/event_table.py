"""The table of events: names, values with their types, and who may emit them. Checks and the guide are made from it.

A name whose first word (before the first dot) begins no name of this table is free: stages, plugs and listeners of
yours may emit it with any values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

HERE, ELSEWHERE, PLUGS = "here", "elsewhere", "plugs"
BOTH = (HERE, ELSEWHERE)

TYPES: Mapping[str, Any] = MappingProxyType({
    "str": str, "int": int, "float": (int, float), "list": list, "plain": (str, int, float, list, tuple, dict),
})  # fmt: skip

ENDS: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "start": {},
    "end": {"elapsed": "float"},
    "fail": {"elapsed": "float", "error": "str", "why": "str", "outcome": "str"},
})  # fmt: skip
"""What the last word of a span's event adds to its values."""


@dataclass(frozen=True)
class EventRow:
    """``values``: for each its type, a word of ``TYPES``, ``Step`` or the legend of a tensor; ``?`` where it may be
    None. ``by``: who may emit it: this process (``here``), a stage that runs ``elsewhere``, ``plugs``. ``span``: it
    stands for NAME.start, NAME.end and NAME.fail. ``more``: further values are allowed, if they are plain."""

    name: str
    about: str
    values: Mapping[str, str]
    by: tuple[str, ...] = (HERE,)
    span: bool = False
    more: bool = False

    def fault(self, values: Mapping[str, Any]) -> str | None:
        """How ``values`` differ from those of the table; None where they do not."""
        for name, kind in self.values.items():
            if not is_a(values.get(name), kind):
                return f"its {name} is not what belongs there"
        for name in values if len(values) > len(self.values) else ():
            if name not in self.values and not (self.more and is_a(values[name], "plain?")):
                return f"its {name} is not in the table"
        return None


def is_a(value: Any, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or is_a(value, kind[:-1])
    if kind == "Step":
        return type(value).__name__ == kind
    if kind.startswith("["):
        return getattr(value, "ndim", None) == len(kind.split())
    return isinstance(value, TYPES[kind]) and (kind == "plain" or not isinstance(value, bool))


PLUG = {"plug": "str", "seam": "str", "what": "str", "expert": "str", "branch": "str", "step": "Step"}

ROWS = (
    EventRow("stage", "a stage runs, or the part of a loop that one place takes", {"stage": "str", "place": "str"},
             span=True),
    EventRow("stage.skipped", "a stage does not run", {"stage": "str", "reason": "str"}),
    EventRow("stage.outdated", "a finished stage runs again", {"stage": "str", "reasons": "list"}),
    EventRow("load", "a component is loaded", {"component": "str"}, BOTH, span=True),
    EventRow("clip", "a run of several clips begins its next one", {"index": "int", "count": "int"}),
    EventRow("step", "a step of the loop", {"step": "Step"}, BOTH, span=True),
    EventRow("prediction", "the latents and their velocity", {"step": "Step", "x": "[B C F h w]",
             "velocity": "[B C F h w]"}, BOTH),
    EventRow("frames", "frames just decoded, uint8", {"frames": "[t H W 3]", "clip": "int"}, BOTH),
    EventRow("prompt.truncated", "a prompt loses its end", {"field": "str", "prompt": "str", "tokens": "int"}, BOTH),
    EventRow("prompt.fallback", "a prompt is not expanded", {"clip": "int", "prompt": "str", "reason": "str"}, BOTH),
    EventRow("plug", "a plug decides something, such as a cache's hit", PLUG, (*BOTH, PLUGS), more=True),
    EventRow("plug.changed", "a half-finished loop goes on with something else plugged in", {"stage": "str",
             "text": "str"}),
    EventRow("memory.dropped", "the State's memory of a plug has no use", {"plug": "str", "names": "list"}, BOTH),
    EventRow("load.note", "a component is loaded with a remark, such as an unknown key of its config",
             {"component": "str", "note": "str"}, BOTH),
    EventRow("setup.note", "a component computes where or how it takes longer than it could", {"text": "str"}, BOTH),
    EventRow("cache.hit", "a result was in the cache", {"stage": "str", "why": "str"}),
    EventRow("cache.miss", "a result was not in the cache", {"stage": "str", "why": "str"}),
    EventRow("cache.fault", "the cache can only be read, or not be used at all", {"text": "str"}),
    EventRow("cache.refused", "a result is not kept", {"stage": "str", "why": "str"}),
    EventRow("place.checked", "a place may run a stage", {"stage": "str", "place": "str"}),
    EventRow("place.retry", "a place was lost and is asked again", {"place": "str", "stage": "str", "attempt": "int",
             "why": "str"}),
    EventRow("travel", "a stage ran elsewhere: bytes, seconds on the way and at work", {"stage": "str", "place": "str",
             "seconds": "float", "sent": "int", "received": "int", "worked": "float"}),
    EventRow("picture.note", "a picture or control video is not taken as its file has it", {"field": "str",
             "text": "str"}),
    EventRow("run.note", "what a run found in its folder", {"run": "str", "text": "str"}),
)  # fmt: skip


def _named(row: EventRow) -> Mapping[str, EventRow]:
    if not row.span:
        return {row.name: row}
    return {f"{row.name}.{end}": replace(row, values={**row.values, **more}) for end, more in ENDS.items()}


EVENTS: Mapping[str, EventRow] = MappingProxyType({name: row for each in ROWS for name, row in _named(each).items()})

FIRST_WORDS = frozenset(name.partition(".")[0] for name in EVENTS)


def fault_of(name: str, values: Mapping[str, Any], by: str = HERE) -> str | None:
    """What is wrong with an event that ``by`` emits; None for one of the table and for one with a free name."""
    row = EVENTS.get(name)
    if row is None:
        return "there is no such event" if name.partition(".")[0] in FIRST_WORDS else None
    return row.fault(values) if by in row.by else f"no stage emits that {by}"

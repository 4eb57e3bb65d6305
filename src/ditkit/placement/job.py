"""What travels: a Job and its inputs there, Messages back. Plain JSON and safetensors; nothing is ever pickled.

A Message is a kind and a payload: ``event`` (JSON, or a State where it holds tensors), ``kept`` and ``outcome``
(States), ``error`` (JSON), ``alive`` (nothing: the other end is at work). Leaves out: how bytes travel.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from ditkit import errors
from ditkit.contracts import Step
from ditkit.errors import DitkitError, PlaceError, StateError
from ditkit.event_table import is_a
from ditkit.events import Event
from ditkit.execution.place import StageResult
from ditkit.execution.stage import Stage
from ditkit.state import State, kind_of

WIRE = 2
"""The version of all that is in this file; two ends of another version refuse each other."""

SAME = "Use the same version of ditkit on both machines"

WORDS = 2000
"""Letters that are shown of each part of an error of another machine."""

KINDS = ("event", "kept", "outcome", "error", "alive")


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Job:
    """A stage to run elsewhere. ``options``: the stage's dataclass fields. ``weights``: fingerprints of its components,
    as the caller knows them; the worker refuses to use others. ``keep_every``: None when nobody keeps. ``ignore``:
    events that nobody listens to. ``made_by``: the stage's class (``validation.py``); empty takes the one there.
    ``plugs``: what is in the seams, as texts (``assembly/plugs.py``)."""

    id: str
    stage: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    stop_at_step: NonNegativeInt | None = None
    keep_every: PositiveInt | None = None
    ignore: Sequence[str] = ()
    made_by: str = ""
    plugs: Sequence[str] = ()
    wire: int = WIRE

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Raises PlaceError."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValueError:
            raise PlaceError("reading a job", "it is not one of this version", SAME) from None


@dataclass(frozen=True)
class Message:
    """``content``: bytes, or a State, which can be sent from where its tensors lie."""

    kind: str
    content: bytes | bytearray | memoryview | State = b""

    @functools.cached_property
    def payload(self) -> bytes | bytearray | memoryview:
        return self.content.to_bytes() if isinstance(self.content, State) else self.content

    def buffers(self) -> Sequence[bytes | bytearray | memoryview]:
        """The payload in pieces, without a copy of the tensors."""
        return self.content.buffers() if isinstance(self.content, State) else [self.content]

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(len(piece) for piece in self.buffers())

    def state(self, source: str) -> State:
        """The State in it; its tensors stay where they are if the payload may be written to. Raises StateError."""
        if isinstance(self.content, State):
            return self.content
        read = State.from_bytes if memoryview(self.content).readonly else State.from_buffer
        return read(self.content, source)  # type: ignore[arg-type]


def options_to_send(stage: Stage) -> dict[str, Any]:
    """All options of a stage, also those that promise equal results."""
    described: tuple[Any, ...] = dataclasses.fields(stage) if dataclasses.is_dataclass(stage) else ()
    return {f.name: getattr(stage, f.name) for f in described}


def with_options(stage: Stage, options: Mapping[str, Any]) -> Stage:
    """``stage`` as the caller has it. Raises PlaceError for an option that this version of the stage lacks."""
    known = options_to_send(stage)
    if set(options) != set(known):
        asked, has = (", ".join(sorted(names)) or "none" for names in (options, known))
        raise PlaceError(f"running stage {stage.name!r} with the options {asked}", f"it has {has}", SAME)
    return dataclasses.replace(stage, **{k: _tuples(v) for k, v in options.items()}) if known else stage  # type: ignore[type-var]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def outcome_to_state(outcome: StageResult, seconds: float = 0.0) -> State:
    about = {"settings": outcome.settings, "plugs": outcome.plugs, "stopped": outcome.stopped, "seconds": seconds}
    about["cacheable"] = outcome.cacheable
    return State({**outcome.written, "outcome": about})


def state_to_outcome(state: State) -> tuple[StageResult, float]:
    """The outcome and the seconds that it took. Raises StateError for a State that holds none."""
    about = state.get("outcome")
    keys = {"settings": dict, "plugs": dict | None, "stopped": bool, "seconds": float, "cacheable": bool}
    if not isinstance(about, dict) or not all(isinstance(about.get(k), t) for k, t in keys.items()):
        raise StateError("reading the outcome of a stage", "it does not say what it came from", "Run the stage again")
    written = {k: v for k, v in state.items() if k != "outcome"}
    told = about["settings"], about["plugs"], about["stopped"], about["cacheable"]
    return StageResult(written, *told), about["seconds"]


def event_to_message(event: Event) -> Message:
    """Values that are neither plain nor tensors (nor a Step) are sent as text."""
    tensors = {f"@{k}": v for k, v in event.values.items() if kind_of(v) == "tensor"}
    plain = {k: _plain(v) for k, v in event.values.items() if f"@{k}" not in tensors}
    about = {"name": event.name, "values": plain, "seconds": event.seconds, "span": event.span, "parent": event.parent}
    if not tensors:
        return Message("event", json.dumps(about).encode())
    return Message("event", State({**tensors, "event": about}).to_bytes())


def _plain(value: Any) -> Any:
    if isinstance(value, Step):
        return {"@step": asdict(value)}
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return str(value)


def message_to_event(message: Message) -> Event:
    """With the ids and the clock of its sender. Raises StateError."""
    data, tensors = bytes(message.payload), {}
    try:
        if data[:1] == b"{":
            about = json.loads(data)
        else:
            state = State.from_bytes(data, "an event")
            about, tensors = state["event"], {k[1:]: state[k] for k in state if k.startswith("@")}
        values = {k: _step(v["@step"]) if isinstance(v, dict) and "@step" in v else v
                  for k, v in about["values"].items()}  # fmt: skip
        wrong = [key for key, kind in _ABOUT.items() if not is_a(about[key], kind)]
        if wrong:
            raise ValueError(wrong[0])
        return Event(values=MappingProxyType({**values, **tensors}), **{key: about[key] for key in _ABOUT})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise StateError("reading an event", f"it is damaged ({e!r})", "Use the same version of ditkit") from None


_ABOUT = {"name": "str", "seconds": "float", "span": "int", "parent": "int"}


def _step(values: Mapping[str, Any]) -> Step:
    window = values.get("frames")
    step = Step(**{**values, "frames": None if window is None else tuple(window)})
    plain = all(is_a(getattr(step, each.name), str(each.type)) for each in fields(Step) if each.name != "frames")
    if not plain or [type(n) for n in step.frames or (0, 0)] != [int, int]:
        raise TypeError("its step is another one")
    return step


def error_to_message(error: BaseException) -> Message:
    """An error of ditkit's keeps its kind and its three parts; of any other only its text travels."""
    if isinstance(error, DitkitError) and type(error).__reduce__ is DitkitError.__reduce__:
        about = {"kind": type(error).__name__, "asked": error.asked, "found": error.found, "do": error.do}
    else:
        found = f"it failed with {type(error).__name__}: {error}"
        about = {"kind": "PlaceError", "asked": "running a stage", "found": found, "do": "Look at its log"}
    return Message("error", json.dumps(about).encode())


def _printable(text: Any) -> str:
    """What a terminal may be shown of somebody else's words."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)[:WORDS])


def message_to_error(payload: bytes | bytearray | memoryview, place: str) -> DitkitError:
    """The same error, which names the place."""
    try:
        about = json.loads(bytes(payload))
        kind = getattr(errors, about["kind"], PlaceError)
        cls = kind if isinstance(kind, type) and issubclass(kind, DitkitError) else PlaceError
        asked, found, do = (_printable(about[part]) for part in ("asked", "found", "do"))
        return cls(f"{asked} (at {place})", found, do)
    except (ValueError, TypeError, KeyError, RecursionError):
        return PlaceError(f"running a stage at {place}", "it failed, and its error is damaged", "Look at its log")

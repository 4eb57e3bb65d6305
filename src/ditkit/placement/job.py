"""What travels: a Job and its inputs there, Messages back. Plain JSON and safetensors; nothing is ever pickled.

A Message is a kind and a payload: ``event`` (JSON, or a State where it holds tensors), ``kept`` and ``outcome``
(States), ``error`` (JSON), ``alive`` (nothing: the other end is at work). A Channel is a way to a Worker, whatever
carries the bytes: HTTP, the pipe to a child process, Ray. Leaves out: how bytes travel."""

import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from ditkit import errors, limits, options
from ditkit.assembly.plugs import texts_of
from ditkit.contracts import Step
from ditkit.errors import DitkitError, PlaceError, StateError
from ditkit.event_table import is_a
from ditkit.events import Event
from ditkit.execution.place import StageCall, StageResult
from ditkit.execution.records import code_of
from ditkit.execution.stage import Stage
from ditkit.failures import doing, explained, wants_memory
from ditkit.hiding import printable
from ditkit.limits import MESSAGE
from ditkit.reading import value_of
from ditkit.state import State, kind_of

WIRE = 2  # the version of all that is in this file; two ends of another version refuse each other
SAME = "Use the same version of ditkit on both machines"
LOG = "Look at its log"
TICK = 0.1  # seconds after which whoever waits looks whether that is still wanted
KINDS = ("event", "kept", "outcome", "error", "alive")


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Job:
    """A stage to run elsewhere. ``options``: the stage's dataclass fields. ``weights``: fingerprints of its components,
    as the caller knows them; the worker refuses to use others. ``keep_every``: None when nobody keeps. ``ignore``:
    events that nobody listens to. ``made_by``: the stage's class; empty takes the one there.
    ``plugs``: what is in the seams, as texts (``assembly/plugs.py``)."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    stage: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    stop_at_step: NonNegativeInt | None = None
    keep_every: PositiveInt | None = None
    ignore: Sequence[str] = ()
    made_by: str = ""
    plugs: Sequence[str] = ()
    wire: int = WIRE

    @classmethod
    def of(cls, call: StageCall) -> Self:
        return cls(
            uuid.uuid4().hex, call.stage.name, options_to_send(call.stage), dict(call.weights), call.stop_at_step,
            call.keep_every if call.keep else None, call.events.ignored(), made_by(call.stage),
            texts_of(call.seams) or (),
        )  # fmt: skip

    def stage_of(self, offered: Stage) -> Stage:
        """``offered`` as the caller has it. Raises PlaceError for another class, and for an option that this version of
        the stage lacks."""
        asked, mine, known = f"running stage {self.stage!r}", made_by(offered), options_to_send(offered)
        if self.wire != WIRE:
            raise PlaceError(asked, f"the job has wire version {self.wire}, this end {WIRE}", SAME)
        if self.made_by not in ("", mine):
            found = f"it is made by {mine} here, and asked for is {self.made_by}"
            raise PlaceError(asked, found, f"Run it where it is defined, or {SAME[0].lower()}{SAME[1:]}")
        if {*self.options} != {*known}:
            wanted, has = (", ".join(sorted(names)) or "none" for names in (self.options, known))
            raise PlaceError(f"{asked} with the options {wanted:.200}", f"it has {has}", SAME)
        return options.made(type(offered), self.options, f"stage {self.stage!r}", StateError) if known else offered

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
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

    @cached_property
    def payload(self) -> bytes | bytearray | memoryview:
        return self.content.to_bytes(summed=False) if isinstance(self.content, State) else self.content

    def buffers(self) -> Sequence[bytes | bytearray | memoryview]:
        """The payload in pieces, without a copy of the tensors."""
        return self.content.buffers() if isinstance(self.content, State) else [self.content]

    @cached_property
    def nbytes(self) -> int:
        return sum(len(piece) for piece in self.buffers())

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.kind in ("outcome", "error")

    def state(self, source: str) -> State:
        """The State in it; its tensors stay where they are if the payload may be written to. Raises StateError."""
        if isinstance(self.content, State):
            return self.content
        read = State.from_bytes if memoryview(self.content).readonly else State.from_buffer
        return read(self.content, source)  # type: ignore[arg-type]


Question = Literal["health", "describe", "probe", "cancel"]


class Channel(Protocol):
    """Methods raise Lost when the Worker is not there or stops answering, PlaceError when it refuses."""

    def ask(self, question: Question, name: str = "") -> dict[str, Any]:
        """A short answer: ``health`` that it is there, ``describe`` what ``Worker.describe`` says, ``probe`` what stage
        ``name`` makes of its fixed input (``probe.py``), ``cancel`` that job ``name`` is to stop at its next event;
        what it has is still sent."""

    def submit(self, job: Job, inputs: State) -> Iterator[Message]:
        """Messages as they come, the last one an outcome or an error."""

    def close(self) -> None: ...


def made_by(stage: Stage) -> str:
    """The class that carries a stage out, and of one that is not ditkit's own its code too. Both ends of a channel must
    have the same; of a class that is in no file nobody can tell, and then nothing equals it."""
    name = f"{type(stage).__module__}.{type(stage).__qualname__}"
    return name if name.startswith("ditkit.") else f"{name} {code_of(stage) or f'in no file {uuid.uuid4().hex}'}"


def options_to_send(stage: Any) -> dict[str, Any]:
    """All options of a stage, also those that promise equal results."""
    return {f.name: getattr(stage, f.name) for f in fields(stage)} if is_dataclass(stage) else {}


_OUTCOME: Mapping[str, Any] = {
    "settings": dict, "plugs": dict | None, "stopped": bool, "cacheable": bool, "seconds": float,
}  # fmt: skip


def outcome_to_state(outcome: StageResult, seconds: float = 0.0) -> State:
    about = {name: getattr(outcome, name) for name in _OUTCOME if name != "seconds"}
    return State({**outcome.written, "outcome": {**about, "seconds": seconds}})


def state_to_outcome(state: State) -> tuple[StageResult, float]:
    """The outcome and the seconds that it took. Raises StateError for a State that holds none."""
    about: Any = state.get("outcome")
    whole = isinstance(about, dict) and all(k in about and isinstance(about[k], t) for k, t in _OUTCOME.items())
    if (
        not whole
        or not math.isfinite(about["seconds"])
        or not all(_are_texts(plugs) for plugs in (about["plugs"] or {}).values())
    ):
        raise StateError("reading the outcome of a stage", "it does not say what it came from", "Run the stage again")
    *told, seconds = (about[name] for name in _OUTCOME)
    return StageResult({k: v for k, v in state.items() if k != "outcome"}, *told), seconds


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_ABOUT = {"name": "str", "seconds": "float", "span": "int", "parent": "int"}


def event_message(event: Event) -> Message:
    """Values that are neither plain nor tensors (nor a Step) are sent as text."""
    tensors = {f"@{k}": v for k, v in event.values.items() if kind_of(v) == "tensor"}
    plain = {k: _plain(v) for k, v in event.values.items() if f"@{k}" not in tensors}
    about = {**{key: getattr(event, key) for key in _ABOUT}, "values": plain}
    if not tensors:
        return Message("event", json.dumps(about).encode())
    return Message("event", State({**tensors, "event": about}).to_bytes(summed=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Step):
        return {"@step": asdict(value)}
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return str(value)


def event_of(message: Message) -> Event:
    """With the ids and the clock of its sender. Raises StateError."""
    data, tensors = bytes(message.payload), {}
    try:
        if data[:1] == b"{":
            about = _said(data)
        else:
            state = State.from_bytes(data, "an event")
            about, tensors = state["event"], {k[1:]: state[k] for k in state if k.startswith("@")}
        values = {k: _step(v["@step"]) if isinstance(v, dict) and "@step" in v else v
                  for k, v in about["values"].items()}  # fmt: skip
        if wrong := [key for key, kind in _ABOUT.items() if not is_a(about[key], kind)]:
            raise ValueError(wrong[0])
        return Event(values=MappingProxyType({**values, **tensors}), **{key: about[key] for key in _ABOUT})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise StateError("reading an event", f"it is damaged ({e!r})", SAME) from None


def _said(data: bytes) -> Any:
    """JSON of a message. Raises ValueError, RecursionError."""
    if len(data) > limits.TEXT:
        raise ValueError(f"more than {limits.TEXT:,} bytes")
    return value_of(data.decode())


def _step(values: Mapping[str, Any]) -> Step:
    window = values.get("frames")
    step = Step(**{**values, "frames": None if window is None else tuple(window)})
    plain = all(is_a(getattr(step, each.name), str(each.type)) for each in fields(Step) if each.name != "frames")
    if not plain or [type(n) for n in step.frames or (0, 0)] != [int, int]:
        raise TypeError("its step is another one")
    return step


def error_message(error: BaseException) -> Message:
    """An error of ditkit's keeps its kind and its three parts; of any other only its text travels."""
    kind = type(error).__name__
    if not isinstance(error, DitkitError) or type(error).__reduce__ is not DitkitError.__reduce__:
        found, do = explained(error)
        do = f"{do}, or look at its log" if wants_memory(error) else LOG
        kind, error = "PlaceError", PlaceError(doing(error, "running a stage"), found, do)
    about = {"kind": kind, "asked": error.asked, "found": error.found, "do": error.do}
    return Message("error", json.dumps(about).encode())


def error_of(payload: bytes | bytearray | memoryview, place: str) -> DitkitError:
    """The same error, which names the place."""
    try:
        about = _said(bytes(payload))
        kind = getattr(errors, about["kind"], PlaceError)
        cls = kind if isinstance(kind, type) and issubclass(kind, DitkitError) else PlaceError
        asked, found, do = (printable(str(about[part])[:MESSAGE]) for part in ("asked", "found", "do"))
        return cls(f"{asked} (at {place})", found, do)
    except (ValueError, TypeError, KeyError, RecursionError):
        return PlaceError(f"running a stage at {place}", "it failed, and its error is damaged", LOG)

"""Stage: what a step of a pipeline declares, and what it is given when it runs. The stages are in ``stages/``."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from ditkit import options
from ditkit.cancel import Cancel
from ditkit.contracts import Seams
from ditkit.errors import PipelineError, RequestError, nearest
from ditkit.events import SILENT, Events
from ditkit.request import Request
from ditkit.schedulers import SCHEDULERS
from ditkit.setup import Setup
from ditkit.state import FIELDS, Field, State
from ditkit.store.cache import StageResult


@runtime_checkable
class Stage(Protocol):
    """A named, pure step; any object with these attributes is one. ``reads`` must be there, ``optional`` may be;
    ``writes`` are all written, ``may_write`` sometimes; ``components`` are those it calls. With ``triggers`` it runs
    only when these fields are in the State. ``loop`` names the fields that it carries from step to step: it can stop in
    between and go on from there. ``together``: of several clips it makes its fields at once, to the same bits as one by
    one. ``fields`` describes fields that ditkit's table does not know. Dataclass fields of the object are its options
    and become part of the fingerprint, but for those with ``compare=False``, which promise equal results."""

    name: str = ""
    version: int = 1
    reads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    may_write: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()
    loop: tuple[str, ...] = ()
    fields: tuple[Field, ...] = ()
    together: bool = False

    def run(self, inputs: Mapping[str, Any], ctx: "Context") -> Mapping[str, Any]:
        """The fields that it writes. A loop that is interrupted says so (``ctx.stopped``), and returns them as they
        stood after its last step."""

    def skip_reason(self, state: State) -> str:
        """Why the State's request does without this stage, or nothing. What it wrote for another request is dropped."""
        return ""

    def needs(self, state: State, stop_at_step: int | None = None) -> tuple[str, ...]:
        """Those of ``components`` that are still called in a run that goes on from ``state`` (to ``stop_at_step``)."""
        return self.components

    def done(self, state: State) -> bool:
        """Whether ``state`` already holds all that this stage would write: it was run; or all that it writes is there,
        unless it rewrites what it reads."""
        if self.name in state.get("stages", []):
            return True
        rewrites = {*self.reads, *self.optional} & {*self.writes}
        return bool(self.writes) and not rewrites and all(name in state for name in self.writes)


class BaseStage(Stage):
    """A Stage with neutral values; a convenience, not a requirement. Also for two that a stage need not have:
    ``before`` or ``after``, the stage beside which it is put when it is plugged in by name; ``settings``, a frozen
    dataclass of settings of its own (``ctx.settings.NAME.SETTING``)."""

    before, after = "", ""
    settings: type | None = None


def check_strides(strides: tuple[int, int, int]) -> None:
    """Raises ValueError for what is no (frames, height, width), pixels to latents."""
    if len(strides) != 3 or not all(0 < stride <= 1024 for stride in strides):
        raise ValueError("strides are three whole numbers from 1 on: frames, height, width")
    if strides[1] != strides[2]:  # a request's sides are checked with one number
        raise ValueError("height and width have one stride")


def writes_of(stage: Stage) -> tuple[str, ...]:
    return *stage.writes, *stage.may_write


def readable(stage: Stage) -> set[str]:
    """The fields that a stage may look at."""
    return {*stage.reads, *stage.optional, *stage.triggers, *stage.loop}


class Only(Mapping[str, Any]):
    """A view of a mapping that knows what may be read; reading anything else is an error that says so. ``before`` is
    called before each reading."""

    def __init__(self, values: Mapping[str, Any], allowed: Iterable[str], stage: str, what: str,
                 before: Callable[[], None] = lambda: None):  # fmt: skip
        self._values, self._allowed, self._before = values, frozenset(allowed), before
        self._stage, self._what = stage, what

    def __getitem__(self, name: str) -> Any:
        if name not in self._allowed:
            has = ", ".join(sorted(self._allowed)) or "none"
            raise PipelineError(f"stage {self._stage!r} reads the {self._what} {name!r}", "it did not declare that",
                                f"Add it to the stage's declaration, which has {has}")  # fmt: skip
        self._before()
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._allowed and name in self._values

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._values if name in self._allowed)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def known_settings(request: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that a stage may read, as records hold them: those of the request, ``STAGE.SETTING`` and ``guided``:
    who reads that depends on no guidance scale, so with another one the negative prompt is encoded as before. The name
    of a scheduler that is not ditkit's own tells its code too."""
    own = {f"{stage}.{k}": v for stage, given in request.get("stage_settings", {}).items() for k, v in given.items()}
    named = {"scheduler": SCHEDULERS.pinned(request["scheduler"])} if "scheduler" in request else {}
    guided = any(request.get(k) not in (None, 1) for k in ("guidance_scale", "guidance_scale_2"))
    return {**request, **own, **named, "guided": guided}


def settings_of(stage: Stage) -> Any:
    """The class of the settings that a stage has of its own, or None."""
    cls = getattr(type(stage), "settings", None)
    return cls if isinstance(cls, type) else None


def with_stage_settings(stages: Iterable[Stage], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a request, where a stage with settings of its own may be named like one of them:
    ``sharpness={"amount": 3}``."""
    own = {s.name: values[s.name] for s in stages if settings_of(s) and s.name in values}
    rest = {name: value for name, value in values.items() if name not in own}
    given = rest.get("stage_settings", {})
    if own and isinstance(given, Mapping):
        return {**rest, "stage_settings": {**given, **own}}
    return rest  # what stands there is no table, which the check of the whole says


def with_own_defaults(stages: Iterable[Stage], request: Request) -> Request:
    """``request`` with all settings of stages that have some of their own. Raises RequestError for one that no stage
    has, or that is of another type; PipelineError for a stage that is named like a setting."""
    own = {s.name: cls for s in stages if (cls := settings_of(s)) is not None}
    for name in own:
        if name in Request.model_fields:
            raise PipelineError(f"the settings of stage {name!r}", "a setting has that name", "Give it another name")
    for name, values in request.stage_settings.items():
        if name not in own:
            asked = ", ".join(f"{name}.{key}" for key in values) or name
            found = f"no stage {name!r} with settings is in this pipeline{nearest(name, (*own, *Setup.model_fields))}"
            do = f"Those with settings are {', '.join(own)}" if own else "Leave it out, or bring the stage with --plug"
            raise RequestError(f"the setting {asked}", found, do)
    given = request.stage_settings
    filled = {
        name: asdict(options.made(cls, given.get(name, {}), f"the settings of stage {name!r}", RequestError))
        for name, cls in own.items()
    }
    return request if filled == given else request.model_copy(update={"stage_settings": filled})


class RecordedSettings:
    """``known_settings`` as attributes, those of stages too (``settings.sharpness.amount``). Remembers which were read:
    a fingerprint holds those and no others."""

    def __init__(self, request: Mapping[str, Any], stage: str = "", read: dict[str, Any] | None = None):
        vars(self).update(_request=request, _stage=stage, _read={} if read is None else read)

    def __getattr__(self, name: str) -> Any:
        if not self._stage and name in self._request.get("stage_settings", {}):
            return RecordedSettings(self._request, f"{name}.", self._read)
        known, name = known_settings(self._request), self._stage + name
        if name not in known:
            found = f"the request has no such setting{nearest(name, known)}"
            raise PipelineError(f"setting {name!r}", found, "Use one of its names")
        self._read[name] = known[name]
        return self._request.get(name, known[name])

    def recorded(self) -> dict[str, Any]:
        """The settings that were read, with their values."""
        return dict(sorted(self._read.items()))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("settings are read-only")


@dataclass(frozen=True)
class StageCall:
    """One stage to run. ``inputs``: the fields that it may look at and no others. ``weights``: fingerprints of its
    components as the caller knows them. ``keep``: told of how a loop stands, every ``keep_every`` steps. ``table``: all
    fields of the pipeline; a stage may use one that another stage describes."""

    stage: Stage
    inputs: State
    weights: Mapping[str, str]
    events: Events = SILENT
    seams: Seams = field(default_factory=Seams)
    stop_at_step: int | None = None
    keep: Callable[[StageResult], None] | None = None
    keep_every: int = 1
    table: Mapping[str, Field] = field(default_factory=lambda: FIELDS)
    cancel: Cancel = field(default_factory=Cancel)


class Context:
    """What a stage is given besides its inputs: components, settings, events, and the seams if it asks for them.
    ``cancel`` is looked at whenever it asks for a component and after each step."""

    def __init__(self, call: StageCall, components: Mapping[str, Any]):
        stage, self._call = call.stage, call
        self.components = Only(components, stage.components, stage.name, "component", call.cancel.check)
        self.settings = RecordedSettings(call.inputs.get("request", {}))
        self.events, self.stop_at_step, self.cancel = call.events, call.stop_at_step, call.cancel
        self.plugs: dict[str, list[str]] | None = None  # what is plugged into the seams, once they are asked for
        self.cacheable = True  # a stage sets it to False for a makeshift, which must not serve other runs
        self.stopped = False  # a loop that is interrupted sets it, and gives its fields as they stand
        self.reached: Callable[[], Mapping[str, Any]] | None = None  # how a loop stood last, for when it fails

    @property
    def seams(self) -> Seams:
        self.plugs = self._call.seams.describe()
        return self._call.seams

    def doing(self) -> str:
        """What is being done, in words."""
        plugs = [re.sub("@[0-9a-f]{16,}", "", plug) for each in (self.plugs or {}).values() for plug in each]
        return f"running stage {self._call.stage.name!r}" + (f" with {' and '.join(plugs)} plugged in" if plugs else "")

    def kept(self, step: int, fields: Callable[[], Mapping[str, Any]]) -> None:
        """A loop tells after each step but the last how it stands; a run that is kept keeps it, every few steps, and
        one that fails later goes on from there."""
        self.reached = fields
        if self._call.keep is not None and step % self._call.keep_every == 0:
            self._call.keep(self.result(fields()))
        self.cancel.check()

    def result(self, fields: Mapping[str, Any]) -> StageResult:
        """``fields``, and what the stage looked at to make them."""
        return StageResult(fields, self.settings.recorded(), self.plugs, self.stopped, self.cacheable)

    def last_result(self) -> StageResult | None:
        """How a loop stood that has failed; None where it did not tell, or its device gives nothing back any more."""
        if self.reached is None:
            return None
        try:
            return replace(self.result(self.reached()), stopped=True)
        except Exception:
            return None

"""Stage and Pipeline: compose, check, run, slice, stop, resume.

A Stage is any object with the attributes of ``Stage`` below. A Pipeline is an immutable, ordered list of stages that is
checked when it is built. Running it threads one State through; a stage sees only the fields and components that it
declared. Leaves out: what the stages compute (``stages/``) and where components come from (``build``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ditkit.checking import fault_of
from ditkit.contracts import Seams
from ditkit.errors import DitkitError, PipelineError, StateError, nearest
from ditkit.events import SILENT, Events
from ditkit.state import FIELDS, Field, State, digest

SOURCES = ("prompt", "negative_prompt", "seed", "request")
"""Fields that the caller brings."""


@runtime_checkable
class Stage(Protocol):
    """A named, pure step. ``reads`` must be there, ``optional`` may be; ``writes`` are all written, ``may_write``
    sometimes; ``components`` are those it calls. With ``triggers`` it runs only when these fields are in the State.
    ``loop`` names the fields that it carries from step to step: it can stop in between and go on from there.
    ``fields`` describes fields that ditkit's table does not know. Dataclass fields of the object are its options and
    become part of the fingerprint, but for those with ``compare=False``, which promise equal results."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def reads(self) -> tuple[str, ...]: ...
    @property
    def optional(self) -> tuple[str, ...]: ...
    @property
    def writes(self) -> tuple[str, ...]: ...
    @property
    def may_write(self) -> tuple[str, ...]: ...
    @property
    def components(self) -> tuple[str, ...]: ...
    @property
    def triggers(self) -> tuple[str, ...]: ...
    @property
    def loop(self) -> tuple[str, ...]: ...
    @property
    def fields(self) -> tuple[Field, ...]: ...

    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        """The fields that it writes. A stage that can stop early returns them as they stand."""
        ...

    def needs(self, state: State) -> tuple[str, ...]:
        """Those of ``components`` that are still called in a run that goes on from ``state``."""
        ...

    def done(self, state: State) -> bool:
        """Whether ``state`` already holds all that this stage would write."""
        ...


class BaseStage:
    """Neutral values for the attributes of a Stage; a convenience, not a requirement."""

    name = ""
    version = 1
    reads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    may_write: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()
    loop: tuple[str, ...] = ()
    fields: tuple[Field, ...] = ()

    def needs(self, state: State) -> tuple[str, ...]:
        return self.components

    def done(self, state: State) -> bool:
        """It was run; or all that it writes is there, unless it rewrites what it reads."""
        if self.name in state.get("stages", []):
            return True
        rewrites = {*self.reads, *self.optional} & {*self.writes}
        return bool(self.writes) and not rewrites and all(name in state for name in self.writes)


class Only(Mapping[str, Any]):
    """A view of a mapping that knows what may be read; reading anything else is an error that says so."""

    def __init__(self, values: Mapping[str, Any], allowed: Iterable[str], stage: str, what: str):
        self._values, self._allowed, self._stage, self._what = values, frozenset(allowed), stage, what

    def __getitem__(self, name: str) -> Any:
        if name not in self._allowed:
            raise PipelineError(
                f"stage {self._stage!r} reads the {self._what} {name!r}",
                "it did not declare that",
                f"Add it to the stage's declaration, which has {', '.join(sorted(self._allowed)) or 'none'}",
            )
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._allowed and name in self._values

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._values if name in self._allowed)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class RecordedSettings:
    """The resolved Request as attributes. Remembers which were read: a fingerprint holds those and no others."""

    def __init__(self, request: Mapping[str, Any]):
        object.__setattr__(self, "_request", request)
        object.__setattr__(self, "read", set())

    def __getattr__(self, name: str) -> Any:
        if name not in self._request:
            raise PipelineError(
                f"setting {name!r}",
                f"the request has no such setting{nearest(name, self._request)}",
                "Use one of its names",
            )
        self.read.add(name)
        return self._request[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("settings are read-only")


class Context:
    """What a stage is given besides its inputs: components, settings, events, and the seams if it asks for them."""

    def __init__(
        self,
        components: Mapping[str, Any],
        settings: RecordedSettings,
        events: Events = SILENT,
        seams: Seams | None = None,
        stop_at_step: int | None = None,
    ):
        self.components, self.settings, self.events, self.stop_at_step = components, settings, events, stop_at_step
        self._seams = seams or Seams()
        self.plugs: dict[str, list[str]] = {}  # what was plugged into the seams, once they were asked for

    @property
    def seams(self) -> Seams:
        self.plugs = self._seams.describe()
        return self._seams


class Interrupted(DitkitError):
    """A run was stopped (Ctrl-C); ``state`` holds everything that was finished until then."""

    exit_code = 130

    def __init__(self, stage: str, state: State):
        super().__init__(f"running stage {stage!r}", "it was interrupted", "Resume from the State that was kept")
        self.stage, self.state = stage, state
        self.finished: list[State] = []  # of a run of several clips, those that were complete


class Stopped(Exception):
    """Raised inside a looping stage when it is interrupted: carries the fields as they stood after the last step."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__("interrupted")
        self.fields = fields


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of stages that fit together; every change gives a new, checked one."""

    stages: tuple[Stage, ...]
    given: tuple[str, ...] = SOURCES

    def __init__(self, stages: Iterable[Stage], given: Iterable[str] = SOURCES):
        object.__setattr__(self, "stages", tuple(stages))
        object.__setattr__(self, "given", tuple(given))
        self._check()

    # --- composing

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.stages]

    def index(self, name: str) -> int:
        if name not in self.names:
            raise PipelineError(
                f"stage {name!r}",
                f"there is none of that name{nearest(name, self.names)}",
                f"The stages are {', '.join(self.names)}",
            )
        return self.names.index(name)

    def __getitem__(self, name: str) -> Stage:
        return self.stages[self.index(name)]

    def insert(self, stage: Stage, *, before: str | None = None, after: str | None = None) -> Pipeline:
        if (before is None) == (after is None):
            raise PipelineError(
                f"inserting stage {stage.name!r}", "it needs exactly one of before= and after=", "Name one stage"
            )
        at = self.index(before) if before is not None else self.index(str(after)) + 1
        return Pipeline([*self.stages[:at], stage, *self.stages[at:]], self.given)

    def replace(self, name: str, stage: Stage) -> Pipeline:
        at = self.index(name)
        return Pipeline([*self.stages[:at], stage, *self.stages[at + 1 :]], self.given)

    def remove(self, name: str) -> Pipeline:
        at = self.index(name)
        return Pipeline([*self.stages[:at], *self.stages[at + 1 :]], self.given)

    @property
    def table(self) -> dict[str, Field]:
        """All fields that can occur: ditkit's own and those that the stages describe."""
        return FIELDS | {f.name: f for s in self.stages for f in s.fields}

    def planned(self, state: State, start: str | None = None, until: str | None = None) -> list[Stage]:
        """The stages from ``start`` to ``until`` that a run from ``state`` would not find done already."""
        return [s for s in self._slice(start, until) if start is not None or not s.done(state)]

    def components(self, start: str | None = None, until: str | None = None) -> list[str]:
        """The components that the stages from ``start`` to ``until`` call, in order of first use."""
        return list(dict.fromkeys(c for s in self._slice(start, until) for c in s.components))

    def _slice(self, start: str | None, until: str | None) -> Sequence[Stage]:
        a = 0 if start is None else self.index(start)
        b = len(self.stages) if until is None else self.index(until) + 1
        if a >= b:
            raise PipelineError(
                f"running from {start!r} until {until!r}", "the first comes after the last", "Swap them"
            )
        return self.stages[a:b]

    # --- checking

    def _check(self) -> None:
        if not self.stages:
            raise PipelineError("building a pipeline", "it has no stages", "Give at least one")
        table, available, possible, seen = dict(FIELDS), set(self.given), set(self.given), set()
        for stage in self.stages:
            where = f"building a pipeline with stage {stage.name!r}"
            if stage.name in seen:
                raise PipelineError(where, "another stage has that name", "Give each stage a name of its own")
            seen.add(stage.name)
            for new in stage.fields:
                old = table.setdefault(new.name, new)
                if (old.kind, old.dtype, old.shape) != (new.kind, new.dtype, new.shape):
                    raise PipelineError(
                        where,
                        f"it declares {new.name!r} as {new.kind} {new.dtype} [{new.shape}], but it is "
                        f"{old.kind} {old.dtype} [{old.shape}]",
                        "Use another name or the same kind, dtype and shape",
                    )
            for name in (*stage.reads, *stage.optional, *stage.writes, *stage.may_write, *stage.triggers):
                if name not in table:
                    raise PipelineError(
                        where,
                        f"nobody describes its field {name!r}{nearest(name, table)}",
                        "Describe it in the stage's `fields`",
                    )
            for name in stage.triggers:
                if name not in possible:
                    raise PipelineError(
                        where,
                        f"it can never run: nothing before it writes its trigger {name!r}",
                        "Move it, or add a stage that writes that field",
                    )
            for name in stage.reads:
                if name not in available and not (stage.triggers and name in possible):
                    raise PipelineError(
                        where,
                        f"it reads {name!r}, which no stage before it writes",
                        "Move it, or add a stage that writes that field",
                    )
            possible |= {*stage.writes, *stage.may_write}
            if not stage.triggers:
                available |= set(stage.writes)

    # --- running

    def run(
        self,
        state: State,
        components: Mapping[str, Any],
        *,
        start: str | None = None,
        until: str | None = None,
        stop_at_step: int | None = None,
        events: Events = SILENT,
        seams: Seams | None = None,
        debug: bool = False,
    ) -> State:
        """Thread ``state`` through the stages from ``start`` (default: the first that is not done) to ``until``.

        With ``stop_at_step`` a looping stage stops after that many steps, and the run with it. Raises Interrupted,
        which carries the State so far, on Ctrl-C."""
        if stop_at_step is not None and stop_at_step < 0:
            raise PipelineError(f"stop_at_step={stop_at_step}", "no step comes before the first", "Give 0 or more")
        seams = seams or Seams()
        for stage in self._slice(start, until):
            missing = [name for name in stage.triggers if name not in state]
            reason = (
                f"no {', '.join(missing)}"
                if missing
                else "already in the State"
                if start is None and stage.done(state)
                else ""
            )
            if reason:
                events.emit("stage.skipped", stage=stage.name, reason=reason)
                continue
            try:
                state = self._run_stage(stage, state, components, Options(events, seams, stop_at_step, debug))
            except KeyboardInterrupt:  # while a component was loaded, too
                raise Interrupted(stage.name, state) from None
            if stage.loop and not stage.done(state):
                break
        return state

    def _run_stage(self, stage: Stage, state: State, components: Mapping[str, Any], options: Options) -> State:
        absent = [name for name in stage.reads if name not in state]
        if absent:
            raise PipelineError(
                f"running stage {stage.name!r}",
                f"the State has no {', '.join(absent)}",
                "Run the stages before it first",
            )
        needed = needed_components(stage, state)
        lacking = [name for name in needed if name not in components]
        if lacking:
            raise PipelineError(
                f"running stage {stage.name!r}", f"there is no component {', '.join(lacking)}", "Load it"
            )
        readable = {*stage.reads, *stage.optional, *stage.triggers, *stage.loop}
        ctx = Context(
            Only(components, stage.components, stage.name, "component"),
            RecordedSettings(state.get("request", {})),
            options.events,
            options.seams,
            options.stop_at_step,
        )
        if options.debug:
            self._check_fields(stage, {n: state[n] for n in readable if n in state}, state)
        weights = {
            n: getattr(components[n], "fingerprint", "none") if n in needed else state["weights"][n]
            for n in stage.components
        }
        self._check_weights(stage, state, weights)
        with options.events.span("stage", stage=stage.name):
            try:
                written = stage.run(Only(state, readable, stage.name, "field"), ctx)
            except Stopped as e:
                raise Interrupted(stage.name, self._after(stage, state, weights, ctx, e.fields)) from None
        allowed = {*stage.writes, *stage.may_write}
        undeclared, unwritten = sorted(set(written) - allowed), [n for n in stage.writes if n not in written]
        if undeclared or unwritten:
            found = (
                f"it wrote {', '.join(undeclared)} undeclared"
                if undeclared
                else f"it did not write {', '.join(unwritten)}"
            )
            raise PipelineError(f"running stage {stage.name!r}", found, "Make its declaration and its result agree")
        if options.debug:
            self._check_fields(stage, written, state)
        return self._after(stage, state, weights, ctx, written)

    def _after(
        self, stage: Stage, state: State, weights: Mapping[str, str], ctx: Context, written: Mapping[str, Any]
    ) -> State:
        """The State with what a stage wrote, where that came from, which weights were at work and what is finished.

        A stage that runs once more takes back what the stages after it made of its earlier result."""
        finished = state.get("stages", [])
        if stage.name in finished:
            at = self.index(stage.name)
            kept = {name for s in self.stages[: at + 1] for name in (*s.writes, *s.may_write)}
            later = self.stages[at + 1 :]
            stale = {name for s in later if s.name in finished for name in (*s.writes, *s.may_write)} - kept
            finished = [n for n in finished if n not in {s.name for s in later}]
            state = state.without(*stale)
        fields = {
            **written,
            "weights": {**state.get("weights", {}), **weights},
            "stages": [*(n for n in finished if n != stage.name), stage.name],
        }
        return state.with_fields(fields, _fingerprints(stage, state, weights, ctx, written))

    def _check_weights(self, stage: Stage, state: State, weights: Mapping[str, str]) -> None:
        """A half-finished loop goes on with the weights that began it, or not at all."""
        before = state.get("weights", {})
        others = [n for n in weights if before.get(n, weights[n]) != weights[n]]
        if others and any(n in state for n in stage.loop):
            raise StateError(
                f"going on with stage {stage.name!r} from a State",
                f"it was begun with another {others[0]}",
                "Use the same weights, dtype and precision as before",
            )

    def _check_fields(self, stage: Stage, values: Mapping[str, Any], state: State) -> None:
        """Debug runs: kind, dtype and shape legend of each field; a letter means one size throughout the values."""
        sizes: dict[str, int] = {}
        for name, value in values.items():
            fault = fault_of(self.table[name], value, sizes)
            if fault:
                raise PipelineError(f"stage {stage.name!r} with field {name!r}", fault, "Make them agree")


@dataclass(frozen=True)
class Options:
    events: Events
    seams: Seams
    stop_at_step: int | None
    debug: bool


def needed_components(stage: Stage, state: State) -> list[str]:
    """The components that have to be there for ``stage`` to run from ``state``: those that it still calls, and those
    whose fingerprints the State does not remember."""
    calls, known = stage.needs(state), state.get("weights", {})
    return [name for name in stage.components if name in calls or name not in known]


def fingerprint_of(state: State, name: str) -> str:
    """The fingerprint of a field; of a field that the caller brought, the hash of its content."""
    return state.fingerprints.get(name) or digest(name, state[name])


def _fingerprints(
    stage: Stage, state: State, weights: Mapping[str, str], ctx: Context, written: Mapping[str, Any]
) -> dict[str, str]:
    """Name, version and options of the stage, the settings that it read, what was plugged into the seams if it asked
    for them, its weights and its inputs, hashed.

    A looping stage adds the step that it reached, and is blind to where it was interrupted: going on from its own
    earlier fields counts as one run."""
    request = state.get("request", {})
    described: tuple[Any, ...] = dataclasses.fields(stage) if dataclasses.is_dataclass(stage) else ()
    options = {f.name: getattr(stage, f.name) for f in described if f.compare}
    inputs = {
        n: fingerprint_of(state, n)
        for n in (*stage.reads, *stage.optional, *stage.triggers)
        if n in state and n not in stage.loop and n != "request"
    }
    settings = {k: request[k] for k in sorted(ctx.settings.read)}
    base = [stage.name, stage.version, options, settings, ctx.plugs, weights, inputs]

    def key(name: str, fields: Mapping[str, Any], origin: list[str]) -> str:
        reached = fields.get("step", 0) if stage.loop else 0
        return digest(name, base, reached, origin)

    held = [n for n in stage.loop if n in state]
    own = all(state.fingerprints.get(n) == key(n, state, []) for n in held)
    origin = [] if own else [fingerprint_of(state, n) for n in held]
    return {name: key(name, written, origin) for name in written}

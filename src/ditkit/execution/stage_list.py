"""Stage and StageList: compose, check, run, slice, stop, resume.

A Stage is any object with the attributes of ``Stage`` below. A StageList is an immutable, ordered list of stages that
is checked when it is built. Running it threads one State through; a stage sees only the fields and components that it
declared. Leaves out: what the stages compute (``stages/``), where one stage is carried out (``running.py``), what makes
a result out of date (``records.py``), and where components come from (``build``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditkit.checking import fault_of
from ditkit.contracts import Seams
from ditkit.errors import PipelineError, StateError, nearest
from ditkit.events import SILENT, Events
from ditkit.execution.place import (
    Checkpointer,
    Here,
    Interrupted,
    Place,
    ResultCache,
    Segment,
    StageCall,
    StageResult,
    checked,
    readable,
)
from ditkit.execution.records import code_of, fingerprint_of, fingerprints, outdated, record_of
from ditkit.execution.stage import BaseStage, Context, Only, RecordedSettings, Stage, Stopped, known_settings
from ditkit.stage_result import CacheKey
from ditkit.state import FIELDS, Field, State

__all__ = [
    "SOURCES",
    "BaseStage",
    "Context",
    "Interrupted",
    "Only",
    "Options",
    "RecordedSettings",
    "Stage",
    "StageList",
    "Stopped",
    "fingerprint_of",
]  # fmt: skip

SOURCES = ("prompt", "negative_prompt", "seed", "request")
"""Fields that the caller brings."""


@dataclass(frozen=True)
class StageList:
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

    def insert(self, stage: Stage, *, before: str | None = None, after: str | None = None) -> StageList:
        if (before is None) == (after is None):
            raise PipelineError(
                f"inserting stage {stage.name!r}", "it needs exactly one of before= and after=", "Name one stage"
            )
        at = self.index(before) if before is not None else self.index(str(after)) + 1
        return StageList([*self.stages[:at], stage, *self.stages[at:]], self.given)

    def replace(self, name: str, stage: Stage) -> StageList:
        at = self.index(name)
        return StageList([*self.stages[:at], stage, *self.stages[at + 1 :]], self.given)

    def remove(self, name: str) -> StageList:
        at = self.index(name)
        return StageList([*self.stages[:at], *self.stages[at + 1 :]], self.given)

    @property
    def table(self) -> dict[str, Field]:
        """All fields that can occur: ditkit's own and those that the stages describe."""
        return FIELDS | {f.name: f for s in self.stages for f in s.fields}

    def planned(self, state: State, start: str | None = None, until: str | None = None) -> list[Stage]:
        """The stages from ``start`` to ``until`` that a run from ``state`` would not find done already."""
        state = self._wanted(state)
        return [s for s in self._slice(start, until) if not self._skip_reason(s, state, asked=start is not None)]

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
        places: Mapping[str, Sequence[Segment]] | None = None,
        keep: Checkpointer | None = None,
        results: ResultCache | None = None,
    ) -> State:
        """Thread ``state`` through the stages from ``start`` (default: the first that is not done) to ``until``.

        With ``stop_at_step`` a looping stage stops after that many steps, and the run with it. ``places``: stages that
        run elsewhere, a loop maybe in several places one after the other. ``keep`` is given the State as it grows;
        ``results`` are asked before a stage runs. Raises Interrupted, which carries the State so far, on Ctrl-C."""
        if stop_at_step is not None and stop_at_step < 0:
            raise PipelineError(f"stop_at_step={stop_at_step}", "no step comes before the first", "Give 0 or more")
        how = Options(components, events, seams or Seams(), stop_at_step, debug, places or {}, keep, results)
        state = self._wanted(state)
        for stage in self._slice(start, until):
            try:
                reason = self._skip_reason(stage, state, asked=start is not None, events=events)
                if reason:
                    events.emit("stage.skipped", stage=stage.name, reason=reason)
                    continue
                if stage.loop and stage.done(state):  # all of it once more, not another look at its end
                    state = state.without(*stage.loop)
                state = self._run_stage(stage, state, how)
                if keep is not None:
                    keep(state)
            except KeyboardInterrupt:  # while a component was loaded or a State was written, too
                raise Interrupted(stage.name, state) from None
            if stage.loop and not stage.done(state):
                break
        return state

    def prepare(
        self,
        state: State,
        components: Mapping[str, Any],
        *,
        start: str | None = None,
        until: str | None = None,
        places: Mapping[str, Sequence[Segment]] | None = None,
        results: ResultCache | None = None,
        events: Events = SILENT,
        seams: Seams | None = None,
    ) -> None:
        """All parts first, of all stages that a run from ``state`` would not find done: a damaged one, or a host that
        is not there, is found now, and not after the denoising that it would throw away. Not those that the rest of a
        begun run has no use for, such as the first of two experts after the switch, nor those of stages whose results
        are at hand. Raises Interrupted on Ctrl-C."""
        how = Options(components, events, seams or Seams(), None, False, places or {}, None, results)
        state = self._wanted(state)
        stages = self.planned(state, start, until)
        try:
            for stage in stages:
                if all(name in state for name in (*stage.triggers, *stage.reads)):
                    question = self._cache_key(stage, state, how) if results is not None else None
                    found = results.find(question)[0] if results is not None and question is not None else None
                    if found is not None and question is not None:
                        state = self._after(stage, state, question.weights, found)
                        continue
                for place, names in how.calls(stage, state):
                    place.prepare(stage, names, events)
        except KeyboardInterrupt:
            raise Interrupted(stages[0].name, state) from None

    def outdated(self, stage: Stage, state: State) -> list[str]:
        """Why the result of ``stage`` does not belong to what the State asks for (``records.py``)."""
        return outdated(stage, state, {n for s in self.stages[self.index(stage.name) :] for n in _writes(s)})

    def _wanted(self, state: State) -> State:
        """``state`` without what stages wrote that its request does without now."""
        for stage in self.stages:
            if stage.name in state.get("records", {}) and stage.skip_reason(state):
                records = {n: r for n, r in state["records"].items() if n != stage.name}
                finished = [n for n in state["stages"] if n != stage.name]
                state = state.without(*_writes(stage)).with_fields({"records": records, "stages": finished})
        return state

    def _skip_reason(self, stage: Stage, state: State, asked: bool, events: Events = SILENT) -> str:
        """Why ``stage`` does not run now, or nothing."""
        if why := stage.skip_reason(state):
            return why
        missing = [name for name in stage.triggers if name not in state]
        if missing:
            return f"no {', '.join(missing)}"
        if asked or not stage.done(state):
            return ""
        if reasons := self.outdated(stage, state):
            events.emit("stage.outdated", stage=stage.name, reasons=reasons)
            return ""
        return "already in the State"

    def _run_stage(self, stage: Stage, state: State, how: Options) -> State:
        absent = [name for name in stage.reads if name not in state]
        if absent:
            raise PipelineError(
                f"running stage {stage.name!r}",
                f"the State has no {', '.join(absent)}",
                "Run the stages before it first",
            )
        inputs = _inputs(stage, state)
        if how.debug:
            self._check_fields(stage, inputs, state)
        question = self._cache_key(stage, state, how) if how.results is not None else None
        if question is not None and how.results is not None:
            found, why = how.results.find(question)
            how.events.emit(f"cache.{'miss' if found is None else 'hit'}", stage=stage.name, why=why)
            if found is not None:
                return self._after(stage, state, question.weights, checked(stage, found))
        weights = self._weights(stage, state, how)
        self._check_weights(stage, state, weights)
        segments = how.segments(stage)
        first = max(i for i, segment in enumerate(segments) if segment.from_step <= state.get("step", 0))
        read: dict[str, Any] = {}  # by all segments: what the whole result depends on
        for at, segment in enumerate(segments[first:], first):
            end = segments[at + 1].from_step if at + 1 < len(segments) else None
            stop = min((x for x in (end, how.stop_at_step) if x is not None), default=None)
            with how.events.span("stage", stage=stage.name, place=segment.place.name):
                kept = self._keep(stage, state, weights, how)
                task = StageCall(stage, inputs, weights, how.events, how.seams, stop, *kept, self.table)
                try:
                    outcome = segment.place.run(task)
                except KeyboardInterrupt:  # the steps of the segments before it are not lost
                    raise Interrupted(stage.name, state) from None
            if outcome.stopped:
                raise Interrupted(stage.name, self._after(stage, state, weights, outcome))
            checked(stage, outcome)
            if how.debug:
                self._check_fields(stage, outcome.written, state)
            state = self._after(stage, state, weights, outcome)
            read |= outcome.settings
            if end is None or end != stop or stage.done(state):
                break
            if how.keep is not None:  # a hand-over is an end: the next place may not be there
                try:
                    how.keep(state)
                except KeyboardInterrupt:
                    raise Interrupted(stage.name, state) from None
            inputs = _inputs(stage, state)
        if question is not None and stage.done(state):
            self._store(question, replace(outcome, settings=read), how, state)
        return state

    def _store(self, question: CacheKey, outcome: StageResult, how: Options, state: State) -> None:
        """A Ctrl-C meanwhile does not lose what was computed."""
        assert how.results is not None
        try:
            why = how.results.store(question, outcome) if outcome.cacheable else "it is a makeshift of the stage"
        except KeyboardInterrupt:
            raise Interrupted(question.stage, state) from None
        if why:
            how.events.emit("cache.refused", stage=question.stage, why=why)

    def _keep(self, stage: Stage, state: State, weights: Mapping[str, str], how: Options) -> tuple[Any, int]:
        if how.keep is None or not stage.loop:
            return None, 1
        save = how.keep
        return lambda outcome: save(self._after(stage, state, weights, outcome)), save.every

    def _cache_key(self, stage: Stage, state: State, how: Options) -> CacheKey | None:
        """What to ask for a whole result of ``stage``; None for a part of a loop."""
        if stage.loop and (how.stop_at_step is not None or any(n in state for n in stage.loop)):
            return None
        weights = self._weights(stage, state, how)
        record = record_of(stage, state, weights, {}, {})
        known = known_settings(state.get("request", {}))
        software = {k: v for segment in how.segments(stage) for k, v in segment.place.software().items()}
        parts = record["options"], weights, record["inputs"], known, how.seams.describe(), software
        return CacheKey(stage.name, stage.version, code_of(stage), *parts)

    @staticmethod
    def _weights(stage: Stage, state: State, how: Options) -> dict[str, str]:
        """Fingerprints of the stage's components: of those that it still calls, from where they are called; of the
        others, as the State remembers them. Of those that a later part of the loop will call there are none yet."""
        found: dict[str, str] = {}
        for place, names in how.calls(stage, state):
            asked = [name for name in names if name not in found]
            found |= place.fingerprints(stage, asked) if asked else {}
            lacking = [name for name in asked if name not in found]
            if lacking:
                what = f"there is no component {', '.join(lacking)}"
                raise PipelineError(f"running stage {stage.name!r} at {place.name}", what, "Load it")
        known = state.get("weights", {}) | found
        return {name: known[name] for name in stage.components if name in known}

    def _after(self, stage: Stage, state: State, weights: Mapping[str, str], outcome: StageResult) -> State:
        """The State with what a stage wrote, where that came from, which weights were at work and what is finished.

        A stage that runs once more takes back what the stages after it made of its earlier result."""
        record = record_of(stage, state, weights, outcome.settings, outcome.plugs)
        prints = fingerprints(stage, state, record, outcome.written, outcome.cacheable)
        finished, records = state.get("stages", []), state.get("records", {})
        if stage.name in finished:
            at = self.index(stage.name)
            kept = {name for s in self.stages[: at + 1] for name in _writes(s)}
            later = self.stages[at + 1 :]
            stale = {name for s in later if s.name in finished for name in _writes(s)} - kept
            finished = [n for n in finished if n not in {s.name for s in later}]
            records = {n: r for n, r in records.items() if n in finished}
            state = state.without(*stale)
        fields = {
            **outcome.written,
            "weights": {**state.get("weights", {}), **weights},
            "stages": [*(n for n in finished if n != stage.name), stage.name],
            "records": {**records, stage.name: record},
        }
        return state.with_fields(fields, prints)

    def _check_weights(self, stage: Stage, state: State, weights: Mapping[str, str]) -> None:
        """A half-finished loop goes on with the weights that began it, or not at all."""
        before = state.get("weights", {})
        others = [n for n in weights if before.get(n, weights[n]) != weights[n]]
        if others and any(n in state for n in stage.loop):
            raise StateError(
                f"going on with stage {stage.name!r} from a State",
                f"it was begun with another {others[0]}",
                "Use the same weights, dtype and dtype_policy as before",
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
    """How a run is carried out; none of it is in the State."""

    components: Mapping[str, Any]
    events: Events
    seams: Seams
    stop_at_step: int | None
    debug: bool
    places: Mapping[str, Sequence[Segment]]
    keep: Checkpointer | None
    results: ResultCache | None

    def segments(self, stage: Stage) -> Sequence[Segment]:
        return self.places.get(stage.name) or (Segment(Here(self.components)),)

    def calls(self, stage: Stage, state: State) -> list[tuple[Place, Sequence[str]]]:
        """Where ``stage`` still runs from ``state``, and which of its components are called there. What a scheduler of
        the user's makes of the noise levels is not known before; then it is all of them."""
        found: list[tuple[Place, Sequence[str]]] = []
        segments, done = self.segments(stage), state.get("step", 0) if stage.loop else 0
        for at, segment in enumerate(segments):
            end = segments[at + 1].from_step if at + 1 < len(segments) else None
            last = min((step for step in (end, self.stop_at_step) if step is not None), default=None)
            begin = max(done, segment.from_step)
            if (end is not None and end <= done) or (last is not None and begin >= last and begin > done):
                continue
            there = state if begin == done else state.with_fields({"step": begin})
            names = stage.components if self.seams.scheduler is not None else stage.needs(there, last)
            found.append((segment.place, names))
        return found


def _inputs(stage: Stage, state: State) -> State:
    """What goes to where the stage runs: what it may look at, and the request, of which it is given the settings."""
    return State({name: state[name] for name in state if name in readable(stage) or name == "request"})


def _writes(stage: Stage) -> tuple[str, ...]:
    return *stage.writes, *stage.may_write

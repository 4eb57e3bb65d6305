"""Execution: one run of a list of stages, from the first that is due (``records.py``) to the last, each carried out at
its place (``place.py``)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ditkit.cancel import Cancel
from ditkit.checking import fault_of
from ditkit.contracts import Seams
from ditkit.errors import PipelineError, StateError
from ditkit.events import SILENT, Events
from ditkit.execution.place import Call, Checkpointer, Here, Interrupted, Place, Segment, checked, failed
from ditkit.execution.records import code_of, fingerprints, record_of, replugged, skip_reason, wanted
from ditkit.execution.stage import Stage, StageCall, known_settings, readable, writes_of
from ditkit.identify import forgets
from ditkit.plain import counted
from ditkit.state import FIELDS, Field, State
from ditkit.store.cache import Cache, StageResult
from ditkit.store.reasons import CacheKey


@dataclass
class Execution:
    """One run: ``state`` as it grows, and how it is carried out. At every moment ``state`` is what Ctrl-C leaves.

    ``stages``: the whole list; ``due``: the part of it to run. ``asked``: run that also where it is done.
    ``stop_at_step``: where a loop ends, and the run with it. ``places``: stages that run elsewhere, a loop maybe in
    several places one after the other. ``keep`` is given the State as it grows; ``results`` are asked before a stage
    runs. ``identities``: of components, for the State to remember whose work it holds (``Model.identities``)."""

    stages: Sequence[Stage]
    state: State
    components: Mapping[str, Any]
    due: Sequence[Stage]
    asked: bool = False
    stop_at_step: int | None = None
    events: Events = SILENT
    seams: Seams = field(default_factory=Seams)
    debug: bool = False
    places: Mapping[str, Sequence[Segment]] = field(default_factory=dict)
    keep: Checkpointer | None = None
    results: Cache | None = None
    cancel: Cancel = field(default_factory=Cancel)
    identities: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stop_at_step is not None:
            self.stop_at_step = stop = counted(self.stop_at_step, "stop_at_step", PipelineError)
            if stop < 0:
                raise PipelineError(
                    f"stop_at_step={stop}", "no step comes before the first", "Give a whole number, 0 or more"
                )
        self.state = wanted(self.stages, self.state)

    def run(self) -> State:
        """Raises Interrupted, which carries the State so far, on Ctrl-C and Cancel; any other error carries it too, as
        ``so_far``."""
        for stage in self.due:
            with self._interruptible(stage):
                if reason := skip_reason(self.stages, stage, self.state, self.asked, self.events):
                    self.events.emit("stage.skipped", stage=stage.name, reason=reason)
                    continue
                for place, call, weights in self._calls(stage):
                    try:
                        with call, self.events.span("stage", stage=stage.name, place=place.name):
                            call.take(call.run())
                    except Exception:
                        if (reached := call.reached()) is not None:
                            self.state = self._after(stage, weights, reached)
                        raise
                self._keep()
            if stage.loop and not stage.done(self.state):
                break
        return self.state

    def prepare(self) -> None:
        """Load all parts first, of all stages that a run would not find done: a damaged one, or a host that is not
        there, is found now, and not after the denoising that it would throw away. Not those that the rest of a begun
        run has no use for, such as the first of two experts after the switch, nor those of stages whose results are at
        hand. ``state`` is then good for nothing else. Raises Interrupted."""
        planned = [s for s in self.due if not skip_reason(self.stages, s, self.state, self.asked)]
        for stage in planned:
            with self._interruptible(planned[0]):
                if all(name in self.state for name in (*stage.triggers, *stage.reads)):
                    key, found, _ = self._cached(stage)
                    if key is not None and found is not None:
                        self.state = self._after(stage, key.weights, found)
                        continue
                for place, names in self._still_called(stage):
                    for at in range(max(1, len(names))):
                        self.cancel.check()
                        place.prepare(stage, names[at : at + 1], self.events)

    @contextmanager
    def _interruptible(self, stage: Stage) -> Iterator[None]:
        """Ctrl-C, also while a component is loaded or a State is written, ends the run with what was done till then;
        and so does any error, which stays the one that it is."""
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(stage.name, self.state) from None
        except Exception as e:
            failed(e, stage.name, self.state)
            raise

    def _keep(self) -> None:
        if self.keep is not None:
            self.keep(self.state)

    def _calls(self, stage: Stage) -> Iterator[tuple[Place, Call, Mapping[str, str]]]:
        """A call for each place where ``stage`` still runs, with the weights that work there, each made after the one
        before it was carried out; none where the result is in the cache. What comes of them goes into the State."""
        if stage.loop and stage.done(self.state):  # all of it once more, not another look at its end
            self.state = self.state.without(*stage.loop)
        self._check_inputs(stage)
        key, found, why = self._cached(stage)
        weights = self._weights(stage) if key is None else key.weights
        if key is not None:
            self.events.emit(f"cache.{'miss' if found is None else 'hit'}", stage=stage.name, why=why)
        if found is not None:
            self.state = self._after(stage, weights, checked(stage, found))
            return
        self._check_weights(stage, weights)
        seams = self.seams.of(stage.components)
        if other := replugged(stage, self.state, seams.describe()):
            self.events.emit("plug.changed", stage=stage.name, text=other)
        read: dict[str, Any] = {}  # at all places: what the whole result depends on
        for place, _, end, stop in self._segments(stage):
            self.cancel.check()
            call = place.call(self._stage_call(stage, weights, stop))
            yield place, call, weights
            result = call.result if call.result.stopped else checked(stage, call.result)
            if self.debug and not result.stopped:
                self._check_fields(stage, result.written)
            self.state = self._after(stage, weights, result)
            if result.stopped:
                raise KeyboardInterrupt
            read |= result.settings
            if end is None or end != stop or stage.done(self.state):
                break
            self._keep()  # a hand-over is an end: the next place may not be there
            key = None if forgets(seams.describe()) else key  # a plug that forgets made this another result
        if key is not None and self.results is not None and stage.done(self.state):
            whole, makeshift = replace(result, settings=read), "it is a makeshift of the stage"
            if why := self.results.store(key, whole) if result.cacheable else makeshift:
                self.events.emit("cache.refused", stage=stage.name, why=why)

    def _stage_call(self, stage: Stage, weights: Mapping[str, str], stop: int | None) -> StageCall:
        keep = self.keep if stage.loop else None
        told = None if keep is None else lambda result: keep(self._after(stage, weights, result))
        return StageCall(
            stage, _inputs(stage, self.state), weights, self.events, self.seams.of(stage.components), stop,
            keep=told, keep_every=1 if keep is None else keep.every, table=table_of(self.stages), cancel=self.cancel,
        )  # fmt: skip

    def _segments(self, stage: Stage) -> Iterator[tuple[Place, int, int | None, int | None]]:
        """Where ``stage`` still runs: the places with the step where each begins, the one where it hands over, if it
        does, and the one where it stops, be it for that or for good."""
        done = self.state.get("step", 0) if stage.loop else 0
        segments = self.places.get(stage.name) or (Segment(Here(self.components)),)
        ends = [*(segment.from_step for segment in segments[1:]), None]
        for segment, end in zip(segments, ends, strict=True):
            if end is None or end > done:
                stop = min((step for step in (end, self.stop_at_step) if step is not None), default=None)
                yield segment.place, max(done, segment.from_step), end, stop

    def _still_called(self, stage: Stage) -> Iterator[tuple[Place, Sequence[str]]]:
        """Where ``stage`` still runs, and which of its components are called there. What a scheduler of the user's
        makes of the noise levels is not known before; then it is all of them."""
        done = self.state.get("step", 0) if stage.loop else 0
        for place, begin, _, stop in self._segments(stage):
            if begin == done or stop is None or begin < stop:
                there = self.state if begin == done else self.state.with_fields({"step": begin})
                yield place, stage.components if self.seams.scheduler is not None else stage.needs(there, stop)

    def _weights(self, stage: Stage) -> dict[str, str]:
        """Fingerprints of the stage's components: of those that it still calls, from where they are called; of the
        others, as the State remembers them. Of those that a later part of the loop will call there are none yet."""
        found: dict[str, str] = {}
        for place, names in self._still_called(stage):
            asked = [name for name in names if name not in found]
            found |= place.fingerprints(stage, asked) if asked else {}
            if lacking := [name for name in asked if name not in found]:
                what = f"there is no component {', '.join(lacking)}"
                raise PipelineError(f"running stage {stage.name!r} ({place.name})", what, "Load it")
        known = self.state.get("weights", {}) | found
        return {name: known[name] for name in stage.components if name in known}

    def _cached(self, stage: Stage) -> tuple[CacheKey | None, StageResult | None, str]:
        """What to ask the cache for, None without one and for a part of a loop; what it has, and why."""
        part = stage.loop and (self.stop_at_step is not None or any(n in self.state for n in stage.loop))
        if self.results is None or part:
            return None, None, ""
        weights, known = self._weights(stage), known_settings(self.state.get("request", {}))
        record = record_of(stage, self.state, weights, {}, {})
        plugs = self.seams.of(stage.components).describe()
        software = {k: v for place, *_ in self._segments(stage) for k, v in place.software().items()}
        parts = record["options"], weights, record["inputs"], known, plugs, software
        key = CacheKey(stage.name, stage.version, code_of(stage), *parts)
        return key, *self.results.find(key)

    def _after(self, stage: Stage, weights: Mapping[str, str], result: StageResult) -> State:
        """The State with what a stage wrote, where that came from, which weights were at work and what is finished.

        A stage that runs once more takes back what the stages after it made of its earlier result."""
        state, records = self.state, self.state.get("records", {})
        begun = records.get(stage.name, {}) if any(name in state for name in stage.loop) else {}
        settings = {**begun.get("settings", {}), **result.settings}  # those of the loop's earlier part count as well
        record = record_of(stage, state, weights, settings, result.plugs)
        prints = fingerprints(stage, state, record, result.written, result.cacheable)
        finished = state.get("stages", [])
        if stage.name in finished:
            at = [s.name for s in self.stages].index(stage.name)
            kept = {name for s in self.stages[: at + 1] for name in writes_of(s)}
            later = {s.name: s for s in self.stages[at + 1 :]}
            stale = {n for name, s in later.items() if name in finished for n in writes_of(s)} - kept
            finished = [n for n in finished if n not in later]
            records = {n: r for n, r in records.items() if n in finished}
            state = state.without(*stale)
        fields = {
            **result.written,
            "weights": {**state.get("weights", {}), **weights},
            "stages": [*(n for n in finished if n != stage.name), stage.name],
            "records": {**records, stage.name: record},
        }
        if "parts" in (model := state.get("model", {})):
            own = {n: self.identities[n] for n in stage.components if n in self.identities}
            fields["model"] = {**model, "parts": {**model["parts"], **own}}
        state = state.without(*(name for name in stage.loop if name not in result.written))
        return state.with_fields(fields, prints)

    def _check_inputs(self, stage: Stage) -> None:
        if absent := [name for name in stage.reads if name not in self.state]:
            found = f"the State has no {', '.join(absent)}"
            raise PipelineError(f"running stage {stage.name!r}", found, "Run the stages before it first")
        if self.debug:
            self._check_fields(stage, _inputs(stage, self.state))

    def _check_weights(self, stage: Stage, weights: Mapping[str, str]) -> None:
        """A half-finished loop goes on with the weights that began it, or not at all."""
        before = self.state.get("weights", {})
        others = [n for n in weights if before.get(n, weights[n]) != weights[n]]
        if others and any(n in self.state for n in stage.loop):
            asked, found = f"going on with stage {stage.name!r} from a State", f"it was begun with another {others[0]}"
            raise StateError(asked, found, "Use the same weights, dtype and dtype_policy as before")

    def _check_fields(self, stage: Stage, values: Mapping[str, Any]) -> None:
        """Debug runs: kind, dtype and shape legend of each field; a letter means one size throughout the values."""
        table, sizes = table_of(self.stages), dict[str, int]()
        for name, value in values.items():
            if fault := fault_of(table[name], value, sizes):
                raise PipelineError(f"stage {stage.name!r} with field {name!r}", fault, "Make them agree")


def table_of(stages: Sequence[Stage]) -> dict[str, Field]:
    """All fields that can occur: ditkit's own and those that the stages describe."""
    return FIELDS | {f.name: f for stage in stages for f in stage.fields}


def _inputs(stage: Stage, state: State) -> State:
    """What goes to where the stage runs: what it may look at, and the request, of which it is given the settings."""
    return State({name: state[name] for name in state if name in readable(stage) or name == "request"})

"""Fork: a new run that keeps of another one all that still fits, and makes the rest with changed settings.

Without a step every stage whose record still fits the changed request is kept. With a step the loop goes on from the
State after that many steps: what stands before it is made anew where it no longer fits and put in its place, and the
steps that are behind it stay as they were taken. Leaves out: beginning and going on (``run.py``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ditkit import pictures, samples
from ditkit.errors import RequestError, StateError
from ditkit.execution.place import fingerprint_in
from ditkit.execution.records import options_of
from ditkit.execution.stage import Stage, readable, writes_of
from ditkit.execution.stage_list import StageList
from ditkit.prompting import templates
from ditkit.request import Request
from ditkit.runs.folder import WHOLE, Parent, RunFolder, Tell, given
from ditkit.runs.folder import clip as of_clip
from ditkit.trust import PICTURES, check_named

if TYPE_CHECKING:
    from ditkit.events import Listener
    from ditkit.pipeline import Pipeline
    from ditkit.state import State

CALLERS = ("prompt", "negative_prompt", "seed", "request")
SHAPES = ("width", "height", "frames")
SOLVERS = ("scheduler", "scheduler_options")


def prepared(
    parent: RunFolder, changes: Mapping[str, Any], pipe: Pipeline, at_step: int | None, clip: int | None,
    pixels: Mapping[str, Any], listeners: Iterable[Listener], tell: Tell, named: Collection[str] = (),
) -> tuple[State, Parent]:  # fmt: skip
    """What a fork begins from, and its origin; no file is written. ``changes``: fields of the request. ``clip``: which
    one of several. ``pipe``: the model with changed settings of compute. Steps up to ``at_step`` that were not kept
    are taken again, as the parent took them; nothing of that is kept if it is interrupted. ``named``: the pictures
    whose files somebody named; no other file is opened because the parent names it.

    Raises RequestError, StateError for what cannot be put together."""
    source = Source(parent, pipe, which_clip(parent, clip), tuple(listeners), tell)
    old, before = source.newest(), request_of(parent, source.clip)
    request = pipe.request({**before, **changes})
    seen = {**_pictures(old, request, before), **pixels}
    for name in pictures.FIELDS:
        if getattr(request, name) and getattr(request, name) == before[name] and name not in (*seen, *named):
            check_named(PICTURES, f"--{name.replace('_', '-')}", str(before[name]), (), f"forking {parent.path}")
    begun = pipe.begin(request, seen)
    if (count := samples.count(begun)) != samples.count(old):
        found = f"it would make {count} clips"
        raise RequestError(f"forking {parent.path}", found, "A fork makes one clip of one")
    changed = {k: (before[k], v) for k, v in begun["request"].items() if before.get(k) != v}
    state, end = (old, None) if at_step is None else _at_step(source, old, begun, changed, at_step)
    computes_anew = given(pipe.setup) != parent.description.setup
    state = _kept_where_it_fits(pipe, _asked(state, begun, changed), computes_anew, end)
    # Has the loop steps behind it that another request took? A batch rounds otherwise than a clip alone.
    loop, above = loop_of(pipe.stages), parent.description.parent
    going_on = loop is not None and any(n in state for n in pipe.stages.stages[loop].loop)
    batch = parent.description.clips > 1 and not parent.apart
    spliced = going_on and (bool(at_step) or batch or (above is not None and above.spliced))
    origin = Parent(path=str(parent.path), id=parent.description.id, step=at_step, clip=source.clip, changed=changed,
                    spliced=spliced)  # fmt: skip
    return state, origin


def which_clip(parent: RunFolder, index: int | None) -> int | None:
    """Raises RequestError unless one clip is meant: the number of one of several, or None of a run of one."""
    count, asked = parent.description.clips, f"forking {parent.path}"
    if count == 1 and index in (None, 0):
        return None
    if index is None:
        raise RequestError(asked, f"it makes {count} clips", f"Say which: --clip 0 to {count - 1}")
    if not 0 <= index < count:
        raise RequestError(f"{asked} with clip {index}", f"it makes {count}", f"Give a number from 0 to {count - 1}")
    return index


def request_of(parent: RunFolder, index: int | None) -> dict[str, Any]:
    """What the parent asked for; of one of several clips, as if that had been asked for alone. Raises StateError for
    a template that is a file: what ditkit wrote holds its text."""
    request = parent.description.request
    if templates.is_file(template := str(request["expand_template"])):
        found = f"its expand_template {template} is a file, and a file does not decide what is read"
        raise StateError(f"forking {parent.path}", found, "Use an untouched run")
    if index is None:
        return dict(request)
    prompt, negative, seed = Request(**request).samples()[index]
    return {**request, "prompt": prompt, "negative_prompt": negative, "seed": seed, "batched": False}


@dataclass(frozen=True)
class Source:
    """The run that is forked, or that one of its clips, as ``pipe`` sees it."""

    run: RunFolder
    pipe: Pipeline
    clip: int | None
    listeners: tuple[Listener, ...]
    tell: Tell

    @property
    def alone(self) -> int | None:
        """The clip, where it has States of its own."""
        return self.clip if self.run.apart else None

    def newest(self) -> State:
        found = None if self.alone is None else self.run.clip_state(self.alone, self.tell)
        return self.part_of(self.run.state(self.tell)) if found is None else found

    def part_of(self, state: State) -> State:
        """Of a State of all clips that of this one."""
        return state if self.clip is None else samples.split(state, self.pipe.stages.table)[self.clip]

    def after(self, step: int, loop: int) -> State:
        """The State after ``step`` steps; from the nearest earlier one where that was not kept."""
        who = WHOLE if self.alone is None else of_clip(self.alone)
        near = self.run.states.newest(who, self.tell, upto=step) if step > 0 else None
        above, name = self.run.description.parent, self.pipe.stages.names[loop]
        if near is None and step > 0 and above is not None and above.spliced:
            return replace(self, run=_ancestor(self.run, above), clip=above.clip).after(step, loop)
        if near is None:
            near = self.run.state(self.tell) if self.alone is None else self.newest()
            near = taken_back(self.pipe.stages, near, [name])
        if step > (kept := near.get("step", 0)):
            self.tell(f"the steps up to {step} are taken again from step {kept} on, the nearest that was kept")
            near = self.pipe.run(near, until=name, stop_at_step=step, listeners=self.listeners).state
        return self.part_of(near) if self.alone is None else near


def _ancestor(run: RunFolder, above: Parent) -> RunFolder:
    do = "or fork at a later step"
    try:
        found = run.open(above.path)
    except StateError as e:
        asked = f"taking the first steps from the run that was forked in {above.path}"
        raise StateError(asked, e.found, f"Bring it back, {do}") from None
    if found.description.id != above.id:
        asked = f"looking for the run that was forked in {above.path}"
        raise StateError(asked, "there is another one now", f"Bring the old one back, {do}")
    return found


def _pictures(old: State, request: Request, before: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels of the pictures that the request names as before: those of the State, which are there when files are not.
    Reference pictures stand in the State in the size of the video: for another size only ones that came from no file
    will do."""
    found: dict[str, Any] = {}
    resized = any(getattr(request, name) != before[name] for name in (*SHAPES, "image_processing"))
    for name in pictures.FIELDS:
        value = getattr(request, name)
        if name not in old or value != before[name]:
            continue
        if name != "reference_images":
            found[name] = old[name][0].numpy()
        elif not resized or any(item.startswith(pictures.IN_MEMORY) for item in value):
            found[name] = [picture.numpy() for picture in old[name][0]]
    return found


def _asked(old: State, begun: State, changed: Mapping[str, Any]) -> State:
    """``old``, asking for what ``begun`` asks for. Pictures that the new request names as before, in a size as before,
    stay those that they are."""
    resized = not {*SHAPES, "image_processing"}.isdisjoint(changed)
    same = {n for n in pictures.FIELDS if n in old and n in begun and n not in changed and not resized}
    fresh = {n: begun[n] for n in (*CALLERS, *pictures.FIELDS) if n in begun and n not in same}
    kept = {name: text for name, text in old.get("remarks", {}).items() if name in same}
    if remarks := kept | begun.get("remarks", {}):
        fresh["remarks"] = remarks
    gone = [n for n in (*pictures.FIELDS, "remarks") if n not in begun and n not in fresh]
    return old.without(*gone).with_fields(fresh)


def _kept_where_it_fits(pipe: Pipeline, state: State, computes_anew: bool, end: int | None) -> State:
    """``state`` without the results, among the stages before ``end``, that its own request would make otherwise."""
    names, records = [], state.get("records", {})
    for stage in pipe.stages.stages[:end]:
        record, skipped = records.get(stage.name), bool(stage.skip_reason(state))
        stale = bool(pipe.stages.outdated(stage, state)) or (skipped and stage.name in records)
        if computes_anew and not stale and record:
            weights = {n: fingerprint_in(pipe.components, n) for n in stage.components if n in pipe.components}
            stale = any(record["weights"].get(n, print_) != print_ for n, print_ in weights.items())
            stale = stale or record["options"] != options_of(stage)
        ready, begun = not skipped and all(n in state for n in stage.triggers), any(n in state for n in stage.loop)
        if stale or (ready and not begun and not stage.done(state)):
            names.append(stage.name)
    return taken_back(pipe.stages, state, names, end)


def _at_step(source: Source, old: State, begun: State, changed: Mapping[str, Any], step: int) -> tuple[State, int]:
    """The parent's State after ``step`` steps, and where in the pipeline its loop stands. Raises RequestError, and
    StateError for a change that would not be seen, be nonsense, or be refused in the middle of the loop."""
    pipe, steps, asked = source.pipe, source.run.description.steps, f"forking {source.run.path} at step {step}"
    loop = loop_of(pipe.stages)
    if loop is None:
        raise StateError(asked, "none of its stages takes steps", "Leave the step out")
    if not 0 <= step < steps:
        raise RequestError(asked, f"it takes {steps} steps", f"Give a number from 0 to {steps - 1}")
    if step == 0:
        return source.after(step, loop), loop
    _check_goes_on(pipe, begun, changed, asked)
    for name in pipe.stages.stages[loop].components:
        then = old.get("weights", {}).get(name)
        if then is not None and name in pipe.components and fingerprint_in(pipe.components, name) != then:
            do = "Use the same weights, dtype and dtype_policy, or fork at step 0"
            raise StateError(asked, f"the steps before it were taken with another {name}", do)
    state, now = source.after(step, loop), pipe.steps(Request(**begun["request"]))
    if "sigmas" in state and state["sigmas"] != [*(s.sigma for s in now), now[-1].sigma_next]:
        do = "Fork at step 0, or keep steps, shift, convention and sigmas"
        raise StateError(asked, "with these settings it has other noise levels", do)
    return state, loop


def _check_goes_on(pipe: Pipeline, begun: State, changed: Mapping[str, Any], asked: str) -> None:
    from ditkit.schedulers import make

    request, do = begun["request"], "Fork at step 0, or leave it as it was"
    for names, found in ((SHAPES, "the video would have another size"),
                         (SOLVERS, "the scheduler remembers steps of another one")):  # fmt: skip
        if other := [n for n in names if n in changed]:
            raise StateError(f"{asked} with another {other[0]}", found, do)
    scheduler = pipe.seams.scheduler or make(request["scheduler"], **request["scheduler_options"])
    if "seed" in changed and not scheduler.needs_noise:
        found = f"{request['scheduler']} draws no noise after the beginning"
        raise StateError(f"{asked} with another seed", found, do)


def loop_of(pipeline: StageList) -> int | None:
    """Where the stage stands that takes steps."""
    return next((i for i, stage in enumerate(pipeline.stages) if stage.loop), None)


def taken_back(pipeline: StageList, state: State, names: Collection[str], end: int | None = None) -> State:
    """``state`` without the results of the stages ``names`` and of those that saw them, among the stages before
    ``end``. A stage whose result was overwritten by one of these goes too."""
    stages, ran, gone = pipeline.stages[:end], state.get("stages", []), {*names}
    while True:
        gone = dependents(stages, gone)
        lost = {name for stage in stages if stage.name in gone for name in writes_of(stage)}
        more = {s.name for s in stages if s.name in ran and s.name not in gone and lost & {*writes_of(s)}}
        if not more:
            break
        gone |= more
    left: dict[str, Any] = {"stages": [n for n in ran if n not in gone]} if "stages" in state else {}
    if "records" in state:
        left["records"] = {n: r for n, r in state["records"].items() if n not in gone}
    return state.without(*lost).with_fields(left)


def dependents(stages: Sequence[Stage], names: Collection[str]) -> set[str]:
    """``names`` and the stages after them that look at what they write, directly or not."""
    gone, changed = set(names), set[str]()
    for stage in stages:
        if stage.name in gone or readable(stage) & changed:
            gone.add(stage.name)
            changed |= {*writes_of(stage)}
    return gone

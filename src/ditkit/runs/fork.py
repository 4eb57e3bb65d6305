"""Fork: a new run that keeps of another one all that still fits, and makes the rest with changed settings.

Without a step every stage whose record still fits the changed request is kept. With a step the loop goes on from the
State after that many steps: what stands before it is made anew where it no longer fits and put in its place, and the
steps that are behind it stay as they were taken. Leaves out: beginning and going on (``run.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditkit import pictures, samples
from ditkit.errors import RequestError, StateError
from ditkit.execution.place import fingerprint_in
from ditkit.execution.records import options_of
from ditkit.pictures import IN_MEMORY
from ditkit.request import Request
from ditkit.runs.description import Parent
from ditkit.runs.folder import RunFolder, given, opened
from ditkit.runs.kept import WHOLE, Tell, clip
from ditkit.runs.rewind import loop_of, taken_back

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ditkit.events import Listener
    from ditkit.pipeline import Pipeline
    from ditkit.state import State

CALLERS = ("prompt", "negative_prompt", "seed", "request")
SHAPES = ("width", "height", "frames")
SOLVERS = ("scheduler", "scheduler_options")


def prepared(
    parent: RunFolder,
    changes: Mapping[str, Any],
    *,
    pipe: Pipeline,
    at_step: int | None = None,
    clip: int | None = None,
    pixels: Mapping[str, Any] | None = None,
    listeners: Iterable[Listener] = (),
    tell: Tell = lambda _: None,
) -> tuple[State, Parent]:
    """What a fork begins from, and its origin; no file is written. ``changes``: fields of the request. ``clip``: which
    one of several. ``pipe``: the model with changed settings of compute. Steps up to ``at_step`` that were not kept
    are taken again, as the parent took them; nothing of that is kept if it is interrupted.

    Raises RequestError, StateError for what cannot be put together."""
    clip = which_clip(parent, clip)
    old = standing(parent, pipe, clip, tell)
    before = request_of(parent, clip)
    request = pipe.request({**before, **changes})
    begun = pipe.begin(request, {**_pictures(old, request, before), **(pixels or {})})
    if samples.count(begun) != samples.count(old):
        raise RequestError(f"forking {parent.path}", f"it would make {samples.count(begun)} clips",
                           "A fork makes one clip of one")  # fmt: skip
    changed = {k: (before[k], v) for k, v in begun["request"].items() if before.get(k) != v}
    computes_anew = given(pipe.setup) != parent.description.setup
    if at_step is None:
        state = _kept_where_it_fits(pipe, _asked(old, begun, changed), computes_anew)
    else:
        state = _at_step(parent, pipe, begun, changed, at_step, clip, listeners, tell, computes_anew)
    spliced = _spliced(parent, pipe, state, at_step)
    return state, Parent(
        path=str(parent.path), id=parent.description.id, step=at_step, clip=clip, changed=changed, spliced=spliced
    )


def as_parent(parent: RunFolder) -> dict[str, Any]:
    """How often the parent keeps a State, and which ones: a fork does so too, unless something else is said."""
    return {"every": parent.description.every, "keep_steps": parent.description.keep_steps}


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
    """What the parent asked for; of one of several clips, as if that had been asked for alone."""
    request = parent.description.request
    if index is None:
        return dict(request)
    prompt, negative, seed = Request(**request).samples()[index]
    return {**request, "prompt": prompt, "negative_prompt": negative, "seed": seed, "batched": False}


def standing(parent: RunFolder, pipe: Pipeline, index: int | None, tell: Tell) -> State:
    """The newest State of the run, or of that one of its clips."""
    if index is not None and parent.apart:
        own = parent.clip_state(index, tell)
        if own is not None:
            return own
    return _of_clip(pipe, parent.state(tell), index)


def _of_clip(pipe: Pipeline, state: State, index: int | None) -> State:
    return state if index is None else samples.split(state, pipe.stages.table)[index]


def _pictures(old: State, request: Request, before: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels of the pictures that the request names as before: those of the State, which are there when files are not.
    Reference pictures stand in the State in the size of the video: of those only ones that came from no file."""
    found: dict[str, Any] = {}
    for name in pictures.FIELDS:
        value = getattr(request, name)
        if name not in old or value != before[name]:
            continue
        if name != "reference_images":
            found[name] = old[name][0].numpy()
        elif any(item.startswith(IN_MEMORY) for item in value):
            found[name] = [picture.numpy() for picture in old[name][0]]
    return found


def _asked(old: State, begun: State, changed: Mapping[str, Any]) -> State:
    """``old``, asking for what ``begun`` asks for. Pictures that the new request names as before, in a size as before,
    stay those that they are."""
    same = {} if {*SHAPES, "image_processing"} & set(changed) else {
        n: old[n] for n in pictures.FIELDS if n in old and n in begun and n not in changed
    }  # fmt: skip
    fresh = {n: begun[n] for n in (*CALLERS, *pictures.FIELDS) if n in begun and n not in same}
    return old.without(*(n for n in pictures.FIELDS if n not in begun)).with_fields(fresh)


def _kept_where_it_fits(pipe: Pipeline, state: State, computes_anew: bool, end: int | None = None) -> State:
    """``state`` without the results, among the stages before ``end``, that its own request would make otherwise."""
    names = []
    for stage in pipe.stages.stages[:end]:
        skip_reason = bool(stage.skip_reason(state))
        stale = bool(pipe.stages.outdated(stage, state)) or (skip_reason and stage.name in state.get("records", {}))
        if computes_anew and not stale and (record := state.get("records", {}).get(stage.name)):
            weights = {n: fingerprint_in(pipe.components, n) for n in stage.components if n in pipe.components}
            stale = any(record["weights"].get(n, print_) != print_ for n, print_ in weights.items())
            stale = stale or record["options"] != options_of(stage)
        ready, begun = not skip_reason and all(n in state for n in stage.triggers), any(n in state for n in stage.loop)
        if stale or (ready and not begun and not stage.done(state)):
            names.append(stage.name)
    return taken_back(pipe.stages, state, names, end)


def _at_step(
    parent: RunFolder,
    pipe: Pipeline,
    begun: State,
    changed: Mapping[str, Any],
    step: int,
    index: int | None,
    listeners: Iterable[Listener],
    tell: Tell,
    computes_anew: bool,
) -> State:
    asked, loop = f"forking {parent.path} at step {step}", loop_of(pipe.stages)
    if loop is None:
        raise StateError(asked, "none of its stages takes steps", "Leave the step out")
    if not 0 <= step < parent.description.steps:
        raise RequestError(asked, f"it takes {parent.description.steps} steps",
                           f"Give a number from 0 to {parent.description.steps - 1}")  # fmt: skip
    if step > 0:
        _check_goes_on(pipe, begun, changed, asked)
        _check_weights(pipe, standing(parent, pipe, index, tell), asked)
    state = after_steps(parent, pipe, step, index, listeners, tell)
    if step > 0:
        _check_levels(pipe, state, begun, asked)
    return _kept_where_it_fits(pipe, _asked(state, begun, changed), computes_anew, loop)


def after_steps(
    parent: RunFolder, pipe: Pipeline, step: int, index: int | None, listeners: Iterable[Listener], tell: Tell
) -> State:
    """The parent's State after ``step`` steps; from the nearest earlier one where that was not kept."""
    loop = loop_of(pipe.stages)
    assert loop is not None
    first = pipe.stages.stages[loop]
    alone = parent.apart and index is not None
    who = clip(index) if alone and index is not None else WHOLE
    near = parent.states.newest(who, tell, upto=step) if step > 0 else None
    above = parent.description.parent
    if near is None and step > 0 and above is not None and above.spliced:
        return after_steps(_ancestor(above), pipe, step, above.clip, listeners, tell)
    if near is None:
        near = standing(parent, pipe, index, tell) if alone else parent.state(tell)
        near = taken_back(pipe.stages, near, [first.name])
    if step > near.get("step", 0):
        tell(f"the steps up to {step} are taken again from step {near.get('step', 0)} on, the nearest that was kept")
        near = pipe.run(near, until=first.name, stop_at_step=step, listeners=listeners).state
    return near if alone else _of_clip(pipe, near, index)


def _ancestor(above: Parent) -> RunFolder:
    try:
        run = opened(above.path)
    except StateError as e:
        raise StateError(f"taking the first steps from the run that was forked in {above.path}", e.found,
                         "Bring it back, or fork at a later step") from None  # fmt: skip
    if run.description.id != above.id:
        raise StateError(f"looking for the run that was forked in {above.path}", "there is another one now",
                         "Bring the old one back, or fork at a later step")  # fmt: skip
    return run


def _check_weights(pipe: Pipeline, state: State, asked: str) -> None:
    """Raise StateError now for what would be refused when the loop goes on."""
    loop = loop_of(pipe.stages)
    assert loop is not None
    for name in pipe.stages.stages[loop].components:
        then = state.get("weights", {}).get(name)
        if then is not None and name in pipe.components and fingerprint_in(pipe.components, name) != then:
            raise StateError(asked, f"the steps before it were taken with another {name}",
                             "Use the same weights, dtype and dtype_policy, or fork at step 0")  # fmt: skip


def _check_goes_on(pipe: Pipeline, begun: State, changed: Mapping[str, Any], asked: str) -> None:
    """Raise StateError for a change that would not be seen, or be nonsense, in the middle of the loop."""
    from ditkit.schedulers import make

    request = begun["request"]
    for names, found in ((SHAPES, "the video would have another size"),
                         (SOLVERS, "the scheduler remembers steps of another one")):  # fmt: skip
        if other := [n for n in names if n in changed]:
            raise StateError(f"{asked} with another {other[0]}", found, "Fork at step 0, or leave it as it was")
    scheduler = pipe.seams.scheduler or make(request["scheduler"], **request["scheduler_options"])
    if "seed" in changed and not scheduler.needs_noise:
        raise StateError(f"{asked} with another seed", f"{request['scheduler']} draws no noise after the beginning",
                         "Fork at step 0, or leave it as it was")  # fmt: skip


def _check_levels(pipe: Pipeline, state: State, begun: State, asked: str) -> None:
    steps = pipe.steps(Request(**begun["request"]))
    if "sigmas" in state and state["sigmas"] != [*(s.sigma for s in steps), steps[-1].sigma_next]:
        raise StateError(asked, "with these settings it has other noise levels",
                         "Fork at step 0, or keep steps, shift, convention and sigmas")  # fmt: skip


def _spliced(parent: RunFolder, pipe: Pipeline, state: State, at_step: int | None) -> bool:
    """Whether the loop has steps behind it that another request took. A batch rounds otherwise than a clip alone."""
    before, batch = parent.description.parent, parent.description.request["batched"] and parent.description.clips > 1
    loop = loop_of(pipe.stages)
    going_on = loop is not None and any(n in state for n in pipe.stages.stages[loop].loop)
    return going_on and (bool(at_step) or batch or (before is not None and before.spliced))

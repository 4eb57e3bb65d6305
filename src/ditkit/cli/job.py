"""Carry out one run from a State: check where it writes, show it, write what came out, keep what Ctrl-C cut off and
tell the commands that go on. Leaves out: where the State and the settings come from (``opening.py``)."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit import failures
from ditkit.cli import expand, show
from ditkit.cli.flags import RunOptions, flag_of, numbered, sheet_for
from ditkit.cli.naming import TRACEBACK, state_files
from ditkit.cli.terminal import undisturbed
from ditkit.errors import DitkitError, OutputError, PipelineError, RequestError, SetupError, StateError
from ditkit.events import Event
from ditkit.filenames import beside, shortened

if TYPE_CHECKING:
    from ditkit.contracts import Step
    from ditkit.pipeline import Pipeline, Result
    from ditkit.runs import Run
    from ditkit.state import State


@dataclass
class Job:
    """``job.result = job.run()``, by the command itself: that keeps the way from it to the network short."""

    run: Callable[[], Result]
    result: Result | None = None


@contextmanager
def carried_out(pipe: Pipeline, state: State, goal: RunOptions) -> Iterator[Job]:
    """What comes before and after. Raises InterruptedRun on Ctrl-C, and whatever error of ditkit's comes up; before any
    compute where it can be foreseen. An error of anybody else's in a stage is told as one of ditkit's. Whatever ends
    the run, what was computed is kept."""
    from ditkit.execution.place import Interrupted

    steps, makes_video = check(pipe, state, goal)
    out = show.console(stderr=goal.json)
    if not goal.quiet:
        out.print(show.step_table(steps))
    job: Job | None = None
    try:
        if goal.run is None:
            state, goal = expand.before_run(pipe, state, goal, out)
        ran = () if goal.recorder is None else goal.recorder.done
        with show.view(out, goal.quiet, pipe.look(), state["request"]["frames"], ran) as listeners:
            part: dict[str, Any] = {"until": goal.until, "stop_at_step": goal.stop_at_step, "recorder": goal.recorder}
            part["listeners"] = [*listeners, note]
            alone = nullcontext(partial(pipe.run, state, start=goal.start, **part))
            with alone if goal.run is None else goal.run.going(**part) as run:
                job = Job(run)
                yield job
        assert job.result is not None
        result = job.result if goal.run is None else goal.run.with_parent(job.result)
        files = write(result, goal, makes_video)
    except Exception as e:
        error = ended(e, state, job.result if job else None, goal, pipe)
        if error is e:
            raise
        raise error from (None if isinstance(e, Interrupted) else e)
    except KeyboardInterrupt:  # outside the stages: before the first, or while the results were written
        had = job.result.state if job and job.result else state
        raise kept([had], None, goal, pipe).interrupted() from None
    report(result, files, goal, out)


@contextmanager
def naming(place: str | None) -> Iterator[None]:
    """Name ``place``, a State's file or a run's folder, in an error about what to make: that was read there."""
    try:
        yield
    except (PipelineError, RequestError, SetupError, StateError) as e:
        if place is None or place in str(e):
            raise
        raise type(e)(f"{e.asked} (going on with {shortened(place)})", e.found, e.do) from e.__cause__


def ended(error: Exception, state: State, result: Result | None, goal: RunOptions, pipe: Pipeline) -> Exception:
    """What to raise instead of ``error``, which ended a run that began with ``state``; what it had is kept then."""
    from ditkit import samples
    from ditkit.execution.place import Interrupted, further, so_far

    had, told = so_far(error), isinstance(error, DitkitError) or show.lost_output(error)
    if result is not None:
        states, stage, computed = [result.state], None, True
    elif had is not None:
        several = samples.count(had.state) < samples.count(state)
        waiting = samples.split(state)[len(had.finished) + 1 :] if several else []
        states, stage = [*had.finished, had.state, *waiting], had.stage
        computed = bool(had.finished) or further(had.state, state)
    elif isinstance(error, DitkitError):
        states, stage, computed = [state], None, False
    else:  # it comes from before the first stage
        return error
    if isinstance(error, Interrupted):
        return kept(states, stage, goal, pipe).interrupted()
    if computed or not told or goal.run is not None:
        try:
            kept(states, stage, goal, pipe).say()
        except OutputError as e:
            show.say(f"what was computed could not be kept ({e})")
    if told:
        return error
    doing = f"running stage {stage!r}" if stage else "writing what was made"
    return failures.told(error, doing, beside(goal.out if goal.run is None else goal.run.path / "run", TRACEBACK))


def check(pipe: Pipeline, state: State, goal: RunOptions) -> tuple[list[Step], bool]:
    """The step table, and whether the run makes a video. Raises PipelineError for a part of a run that leads nowhere,
    OutputError for every file that could not be written later."""
    from ditkit.request import Request

    steps = pipe.steps(Request(**state["request"]))
    makes_video = _check_part(pipe, state, goal, len(steps))
    _check_files(state, goal, makes_video)
    return steps, makes_video


def _check_part(pipe: Pipeline, state: State, goal: RunOptions, steps: int) -> bool:
    if goal.start is not None:
        pipe.stages.index(goal.start)
    stages, done, stop = pipe.stages.slice(None, goal.until), state.get("step", 0), goal.stop_at_step
    if stop is not None:
        asked = f"--stop-at-step {stop}"
        if not 1 <= stop <= steps:
            raise PipelineError(asked, f"the run has {steps} steps", f"Give a number from 1 to {steps}")
        if stop <= done:
            raise PipelineError(asked, f"the State has {done} steps behind it", "Give a later step")
        if not any(stage.name == "denoise" for stage in stages):
            asked, found = f"{asked} with --until {goal.until}", "the run ends before it takes a step"
            raise PipelineError(asked, found, "Leave one of them out")
    early = stop is not None and stop < steps
    makes = "video" in state or (not early and any("video" in stage.writes for stage in stages))
    if not makes and goal.state is None and not goal.kept:
        asked, found = "a run that stops before its video is made", "it would leave nothing behind"
        raise PipelineError(asked, found, "Add --save-state FILE")
    return makes


def _check_files(state: State, goal: RunOptions, makes_video: bool) -> None:
    from ditkit.media import check_writable, files

    request, count = state["request"], len(state["prompt"])
    clips, sheets = (numbered(goal.out, count), goal.sheets(count)) if makes_video else ([], [])
    single = [("contact sheet", sheet) for sheet in sheets]
    single += [] if goal.state is None else [("State", goal.state)]
    places = [("clip", path.with_suffix("") if path.suffix.lower() == ".png" else path) for path in clips]
    places += [("clip's manifest", path.with_suffix(".json")) for path in clips]
    for (what, path), (other, at) in itertools.combinations([*places, *single], 2):
        a, b = path.resolve(), at.resolve()
        if a == b or a in b.parents:  # a folder of frames is replaced whole
            found = f"the {what} goes there too" if a == b else f"the frames of the {what} replace the folder {path}"
            raise OutputError(f"writing the {other} {at}", found, "Give one of them another name")
    for path in clips:
        check_writable(path, width=request["width"], height=request["height"], fps=request["fps"])
    if any(sheet.suffix.lower() != ".png" for sheet in sheets):
        raise OutputError(f"writing the contact sheet {goal.sheet}", "it is a PNG", "Give it the suffix .png")
    for what, path in single:
        if os.path.isdir(path):
            raise OutputError(f"writing the {what} {path}", "that is a folder", "Give the name of a file")
        files.probe(path)


def note(event: Event) -> None:
    """What a run found in its folder and in pictures, what became of its cache, and what makes it slow."""
    if event.name in ("run.note", "plug.changed", "picture.note", "setup.note", "cache.fault"):
        show.say(event["text"])


note.ignores = frozenset({"prediction", "frames"})  # type: ignore[attr-defined]


def write(result: Result, goal: RunOptions, makes_video: bool) -> dict[str, list[Path]]:
    from ditkit.media import contact_sheet

    files: dict[str, list[Path]] = {"states": [], "clips": [], "sheets": []}
    if goal.state is not None:
        files["states"].append(result.state.save(goal.state))
    if makes_video:
        files["clips"] += result.save(goal.out)
        request, state = result.state["request"], result.state
        for i, path in enumerate(goal.sheets(len(result.videos))):
            how = f"{len(state['sigmas']) - 1} steps, guidance {request['guidance_scale']:g}"
            caption = f"seed {state['seed'][i]}, {how}, {Path(state['model']['name']).name}"
            contact_sheet(result.videos[i], path, state["prompt"][i], caption, fps=request["fps"])
            files["sheets"].append(path)
    return files


def report(result: Result, files: dict[str, list[Path]], goal: RunOptions, out: Any) -> None:
    if not goal.quiet:
        out.print(f"time   {show.times(result.receipt)}")
        for line in show.whereabouts(result.receipt):
            out.print(line)
    if goal.json:
        told: dict[str, Any] = {kind: [str(path) for path in paths] for kind, paths in files.items()}
        keys = ("stages", "loads", "steps", "skipped", "truncated", "places", "travelled", "cached", "retries")
        told |= {key: result.receipt[key] for key in keys}
        told |= {} if goal.run is None else {"run": str(goal.run.path)}
        told["output_sha256"] = [m["output_sha256"] for m in result.manifests]
        print(json.dumps(told))
        return
    if goal.run is not None and not goal.quiet:
        count, size = goal.run.states.nbytes()
        out.print(f"run    {shown(goal.run.path)} (States kept: {count}, {show.size(size)})")
    for kind, paths in files.items():
        for path in paths:
            out.print(str(path) if goal.quiet else f"{kind[:-1]:6} {path}")


class InterruptedRun(DitkitError):
    """Ctrl-C, with what was done until then on disk. The message ends with the commands that go on from there."""

    exit_code = 130

    def __str__(self) -> str:
        return f"{self.asked}: {self.found}. {self.do}"


@dataclass(frozen=True)
class Left:
    """What a run left that did not come to its end: ``where`` that was, the ``places`` that keep it, and the
    ``commands`` that go on. ``folder``: it is kept in one of its own."""

    where: str
    places: str
    commands: list[str]
    folder: bool

    def interrupted(self) -> InterruptedRun:
        found = f"everything until then is kept in {self.places}"
        return InterruptedRun(f"interrupted in {self.where}", found, "\n  ".join(["Resume with:", *self.commands]))

    def say(self) -> None:
        """On stderr, before the error."""
        what = "the run is kept" if self.folder else f"everything until then is kept in {self.places}"
        show.say(f"{what}; once that is mended, go on with:", *self.commands)


def kept(states: list[State], stage: str | None, goal: RunOptions, pipe: Pipeline) -> Left:
    """What it has is saved, unless its folder has it already: one file, or one for each clip that was to be made alone.
    Raises OutputError."""
    where, commands = stage or "the run", []
    if goal.run is not None:
        places, commands = shown(goal.run.path), [go_on(goal.run, goal)]
    else:
        count = len(states)
        paths = state_files(goal.out, states) if goal.state is None else numbered(goal.state, count)
        outs, sheets = numbered(goal.out, count), [None] * count if goal.sheet is None else goal.sheets(count)
        start = ["--start", stage or goal.start] if goal.start else []
        setup = {**(goal.setup or {}), "model": pipe.setup.model}  # a config file may be gone or changed by then
        with undisturbed():
            found = saved(states, paths)
            for at, path, out, sheet in zip(found, paths, outs, sheets, strict=True):
                begin, own = ["--from", str(at), *start], replace(goal, sheet=sheet, state=goal.state and path)
                commands.append(_command(begin, own, ["--out", str(out), *_sheet(own)], setup))
        reached = [f" after step {s['step']} of {len(s['sigmas']) - 1}" for s in states if "step" in s]
        places, where = ", ".join(map(str, found)), "".join([where, *reached[-1:]])
    return Left(where, places, commands, goal.run is not None)


@contextmanager
def kept_for(words: Sequence[str], near: Path, begun: State | None) -> Iterator[None]:
    """What was computed for the command ``words`` is kept, ``near`` that file, when it is interrupted or fails; with
    ``--from`` it goes on. Raises InterruptedRun, and what ended it."""
    from ditkit.execution.place import Interrupted, further, so_far

    try:
        yield
    except Exception as e:
        had, told = so_far(e), isinstance(e, DitkitError) or show.lost_output(e)
        if had is None or (told and not isinstance(e, Interrupted) and not further(had.state, begun or {})):
            raise
        with undisturbed():
            (path,) = saved([had.state], state_files(near, [had.state]))
        left = Left(had.stage, str(path), [shlex.join(["ditkit", *words, "--from", str(path)])], False)
        if isinstance(e, Interrupted):
            raise left.interrupted() from None
        left.say()
        if told:
            raise
        raise failures.told(e, f"running stage {had.stage!r}", beside(near, TRACEBACK)) from e


def saved(states: list[State], paths: list[Path]) -> list[Path]:
    """Save each, and tell where: at ``paths``, or in a temporary folder where that disk takes no more. Raises
    OutputError."""
    try:
        return [state.save(path) for state, path in zip(states, paths, strict=True)]
    except OutputError as e:
        failure = e
    with suppress(OSError):
        folder = Path(tempfile.mkdtemp(prefix="ditkit-kept-"))
        try:
            return [state.save(folder / f"{i}.state.safetensors") for i, state in enumerate(states)]
        except OutputError:
            shutil.rmtree(folder)
    raise failure


def go_on(run: Run, goal: RunOptions) -> str:
    """The command that goes on with a kept run, to the same end."""
    places, own = [] if goal.out.absolute() == run.out else ["--out", str(goal.out)], run_sheet(run, run.out)
    if goal.sheet != run_sheet(run, goal.out) and not (goal.sheet and goal.sheet.absolute() == own):
        places += _sheet(goal)
    known = run.description.setup
    setup = {k: v for k, v in (goal.setup or {}).items() if k != "model" and known.get(k) != v}
    return _command(["--resume", shown(run.path)], goal, places, setup)


def _command(begin: list[str], goal: RunOptions, places: list[str], setup: Mapping[str, Any]) -> str:
    part = ("--until", goal.until), ("--stop-at-step", goal.stop_at_step), ("--save-state", goal.state)
    words = [word for flag, value in part if value is not None for word in (flag, str(value))]
    settings = [word for key, value in setup.items() for word in flag_of(key, value)]
    return shlex.join(["ditkit", "run", *begin, *words, *places, *settings])


def _sheet(goal: RunOptions) -> list[str]:
    return ["--no-sheet"] if goal.sheet is None else ["--sheet", str(goal.sheet)]


def run_sheet(run: Run, out: Path) -> Path | None:
    """The contact sheet of a run that writes its clip to ``out``."""
    chosen = run.description.sheet
    return Path(chosen) if isinstance(chosen, str) else sheet_for(out, None, no_sheet=not chosen)


def shown(path: Path) -> str:
    """A run's folder by its bare name where that is enough, else as short as can be."""
    from ditkit.runs import located

    if located(path.name) == path:
        return path.name
    return os.path.join(".", os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else str(path)

"""Carry out one run from a State: check where it writes, show it, write what came out, keep what Ctrl-C cut off and
tell the commands that go on. Leaves out: where the State and the settings come from (``opening.py``)."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.cli import expand, show
from ditkit.cli.flags import RunOptions, flag_of, numbered, sheet_for
from ditkit.cli.terminal import undisturbed
from ditkit.errors import DitkitError, OutputError, PipelineError
from ditkit.events import Event

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
    compute where it can be foreseen."""
    from ditkit import samples
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
    except DitkitError as e:
        if isinstance(e, Interrupted):
            several = samples.count(e.state) < samples.count(state)
            waiting = samples.split(state)[len(e.finished) + 1 :] if several else []
            raise kept([*e.finished, e.state, *waiting], e.stage, goal, pipe) from None
        if goal.run is not None:
            show.say("the run is kept; once that is mended, go on with:", go_on(goal.run, goal))
        raise
    except KeyboardInterrupt:  # outside the stages: before the first, or while the results were written
        raise kept([job.result.state if job and job.result else state], None, goal, pipe) from None
    report(result, files, goal, out)


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
        if path.is_dir():
            raise OutputError(f"writing the {what} {path}", "that is a folder", "Give the name of a file")
        files.probe(path)


def note(event: Event) -> None:
    """What a run found in its folder and in pictures, and what became of its cache."""
    if event.name in ("run.note", "plug.changed", "picture.note", "cache.fault"):
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


def kept(states: list[State], stage: str | None, goal: RunOptions, pipe: Pipeline) -> InterruptedRun:
    """What to say of an interrupted run. What it has is saved, unless its folder has it already: one file, or one for
    each clip that was to be made alone."""
    where, commands = stage or "the run", []
    if goal.run is not None:
        places, commands = shown(goal.run.path), [go_on(goal.run, goal)]
    else:
        count = len(states)
        paths = numbered(goal.state or goal.out.with_name(f"{goal.out.stem}.state.safetensors"), count)
        outs, sheets = numbered(goal.out, count), [None] * count if goal.sheet is None else goal.sheets(count)
        start = ["--start", stage or goal.start] if goal.start else []
        setup = {**(goal.setup or {}), "model": pipe.setup.model}  # a config file may be gone or changed by then
        with undisturbed():
            for state, path, out, sheet in zip(states, paths, outs, sheets, strict=True):
                state.save(path)
                begin, own = ["--from", str(path), *start], replace(goal, sheet=sheet, state=goal.state and path)
                commands.append(_command(begin, own, ["--out", str(out), *_sheet(own)], setup))
        reached = [f" after step {s['step']} of {len(s['sigmas']) - 1}" for s in states if "step" in s]
        places, where = ", ".join(map(str, paths)), "".join([where, *reached[-1:]])
    found = f"everything until then is kept in {places}"
    return InterruptedRun(f"interrupted in {where}", found, "\n  ".join(["Resume with:", *commands]))


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

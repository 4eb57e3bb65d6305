"""Carry out one run from a State: check where it writes, show it, write what came out, keep what Ctrl-C cut off.

Shared by generate, demo and run. Leaves out: where the State and the settings come from.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ditkit.cli import expansion, show
from ditkit.cli.flags import flag_of, to_path
from ditkit.errors import DitkitError, OutputError, PipelineError
from ditkit.events import Event

if TYPE_CHECKING:
    from ditkit.contracts import Step
    from ditkit.pipeline import Pipeline, Result
    from ditkit.receipt import Recorder
    from ditkit.runs import Run
    from ditkit.state import State

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        parser=to_path,
        help="An .mp4, .gif or .npz file, or .png for a folder of frames. Default: outputs/PROMPT-SEED.mp4.",
    ),
]
Sheet = Annotated[
    Path | None, typer.Option(metavar="FILE.png", parser=to_path, help="The contact sheet. Default: beside the clip.")
]
NoSheet = Annotated[bool, typer.Option("--no-sheet", help="Make no contact sheet.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths of what was written.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; whatever else is shown goes to stderr.")]


ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


class InterruptedRun(DitkitError):
    """Ctrl-C, with what was done until then on disk. The message ends with the commands that go on from there."""

    exit_code = 130

    def __str__(self) -> str:
        return f"{self.asked}: {self.found}. {self.do}"


@dataclass(frozen=True)
class RunOptions:
    """Which part of a run is wanted and where its results go; ``setup`` are the settings that somebody gave for it.
    ``run``: the folder that keeps its States, if one does; ``kept``: one does, and may not be there yet.
    ``recorder``: that of a part which has run."""

    out: Path
    sheet: Path | None
    state: Path | None = None
    start: str | None = None
    until: str | None = None
    stop_at_step: int | None = None
    setup: Mapping[str, Any] | None = None
    quiet: bool = False
    json: bool = False
    run: Run | None = None
    kept: bool = False
    recorder: Recorder | None = None

    def at(
        self, out: Path, sheet: Path | None, setup: Mapping[str, Any], run: Run | None = None, kept: bool = False
    ) -> RunOptions:
        """The same part of a run, with places for its results."""
        return replace(self, out=out, sheet=sheet, setup=setup, run=run, kept=kept or run is not None)


def default_out(prompt: str, seed: int) -> Path:
    """Letters, digits and marks of every script; as many as leave room in a file name for what is added to them."""
    text = unicodedata.normalize("NFC", prompt.lower())
    words = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()
    slug = "-".join(words)[:60].encode()[:180].decode(errors="ignore").rstrip("-")
    return Path("outputs") / f"{slug or 'clip'}-{seed}.mp4"


def sheet_for(out: Path, sheet: Path | None, no_sheet: bool) -> Path | None:
    if sheet is not None and no_sheet:
        raise OutputError(f"--sheet {sheet} with --no-sheet", "they contradict each other", "Give one of them")
    return None if no_sheet else sheet or out.with_name(f"{out.stem}-sheet.png")


def numbered(path: Path, count: int) -> list[Path]:
    """The names that ``Result.save`` gives to the clips of a run."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def carry_out(pipe: Pipeline, state: State, goal: RunOptions) -> None:
    """Raises InterruptedRun on Ctrl-C, and whatever error of ditkit's comes up; before any compute where it can be
    foreseen."""
    from ditkit import samples
    from ditkit.execution.stage_list import Interrupted

    steps, makes_video = check(pipe, state, goal)
    out = show.console(stderr=goal.json)
    if not goal.quiet:
        out.print(show.step_table(steps))
    result: Result | None = None
    try:
        if goal.run is None:
            state, goal = expansion.before_run(pipe, state, goal, out)
        ran = () if goal.recorder is None else goal.recorder.done
        view = show.view(out, goal.quiet, pipe.look(), state["request"]["frames"], ran)
        listeners = [show.warn_of_truncation, note, *([] if view is None else [view])]
        with view or nullcontext():
            part: dict[str, Any] = {"start": goal.start, "until": goal.until, "stop_at_step": goal.stop_at_step}
            part["recorder"] = goal.recorder
            if goal.run is None:
                result = pipe.run(state, **part, listeners=listeners)
            else:
                del part["start"]
                result = goal.run.go(**part, listeners=listeners)
        files = write(result, goal, makes_video)
    except Interrupted as e:
        if goal.run is not None:
            raise kept_in(goal.run, e.stage, goal) from None
        waiting = [] if not one_of_several(e.state, state) else samples.split(state)[len(e.finished) + 1 :]
        raise keep([*e.finished, e.state, *waiting], e.stage, goal, pipe) from None
    except DitkitError:
        if goal.run is not None:
            say(f"the run is kept; once that is mended, go on with:\n  {go_on(goal.run, goal)}")
        raise
    except KeyboardInterrupt:  # outside the stages: before the first, or while the results were written
        if goal.run is not None:
            raise kept_in(goal.run, None, goal) from None
        raise keep([state if result is None else result.state], None, goal, pipe) from None
    report(result, files, goal, out)


def note(event: Event) -> None:
    """What a run found in its folder."""
    if event.name in ("run.note", "plugs.changed"):
        say(event["text"])


note.ignores = frozenset({"prediction", "frames"})  # type: ignore[attr-defined]


def say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def check(pipe: Pipeline, state: State, goal: RunOptions) -> tuple[list[Step], bool]:
    """The step table, and whether the run makes a video. Raises what can be known to go wrong."""
    from ditkit.request import Request

    steps = pipe.steps(Request(**state["request"]))
    makes_video = check_goal(pipe, state, goal, len(steps))
    check_places(state, goal, makes_video)
    return steps, makes_video


def one_of_several(part: State, whole: State) -> bool:
    from ditkit import samples

    return samples.count(part) < samples.count(whole)


def check_goal(pipe: Pipeline, state: State, goal: RunOptions, steps: int) -> bool:
    """Whether the run makes a video. Raises PipelineError for a part of it that leads nowhere."""
    names = pipe.stages.names
    for name in (goal.start, goal.until):
        if name is not None:
            pipe.stages.index(name)
    done = state.get("step", 0)
    if goal.stop_at_step is not None:
        asked = f"--stop-at-step {goal.stop_at_step}"
        if not 1 <= goal.stop_at_step <= steps:
            raise PipelineError(asked, f"the run has {steps} steps", f"Give a number from 1 to {steps}")
        if goal.stop_at_step <= done:
            raise PipelineError(asked, f"the State has {done} steps behind it", "Give a later step")
        if goal.until is not None and names.index(goal.until) < names.index("denoise"):
            raise PipelineError(f"{asked} with --until {goal.until}", "the run ends before it takes a step",
                                "Leave one of them out")  # fmt: skip
    last = len(names) - 1 if goal.until is None else names.index(goal.until)
    early = goal.stop_at_step is not None and goal.stop_at_step < steps
    makes = "video" in state or (not early and any("video" in s.writes for s in pipe.stages.stages[: last + 1]))
    if not makes and goal.state is None and not goal.kept:
        raise PipelineError("a run that stops before its video is made", "it would leave nothing behind",
                            "Add --save-state FILE")  # fmt: skip
    return makes


def check_places(state: State, goal: RunOptions, makes_video: bool) -> None:
    """Raise OutputError now for every file that could not be written later."""
    from ditkit.media import check_writable, files

    request, count = state["request"], len(state["prompt"])
    check_distinct(goal, count, makes_video)
    if makes_video:
        for path in numbered(goal.out, count):
            check_writable(path, width=request["width"], height=request["height"], fps=request["fps"])
        if goal.sheet is not None:
            if goal.sheet.suffix.lower() != ".png":
                raise OutputError(f"writing the contact sheet {goal.sheet}", "it is a PNG", "Give it the suffix .png")
            for path in numbered(goal.sheet, count):
                not_a_folder(path, "contact sheet")
                files.probe(path)
    if goal.state is not None:
        not_a_folder(goal.state, "State")
        files.probe(goal.state)


def check_distinct(goal: RunOptions, count: int, makes_video: bool) -> None:
    """Raise OutputError where one result would replace another, or lie in a folder of frames that is replaced whole."""
    places: list[tuple[str, Path]] = []
    if makes_video:
        for path in numbered(goal.out, count):
            places.append(("clip", path.with_suffix("") if path.suffix.lower() == ".png" else path))
            places.append(("clip's manifest", path.with_suffix(".json")))
        places += [("contact sheet", path) for path in ([] if goal.sheet is None else numbered(goal.sheet, count))]
    if goal.state is not None:
        places.append(("State", goal.state))
    for (what, path), (other, at) in itertools.combinations(places, 2):
        a, b = path.resolve(), at.resolve()
        if a == b or a in b.parents:
            found = f"the {what} goes there too" if a == b else f"the frames of the {what} replace the folder {path}"
            raise OutputError(f"writing the {other} {at}", found, "Give one of them another name")


def not_a_folder(path: Path, what: str) -> None:
    if path.is_dir():
        raise OutputError(f"writing the {what} {path}", "that is a folder", "Give the name of a file")


def write(result: Result, goal: RunOptions, makes_video: bool) -> dict[str, list[Path]]:
    from ditkit.media import contact_sheet

    files: dict[str, list[Path]] = {"states": [], "clips": [], "sheets": []}
    if goal.state is not None:
        files["states"].append(result.state.save(goal.state))
    if makes_video:
        files["clips"] += result.save(goal.out)
        if goal.sheet is not None:
            request, state = result.state["request"], result.state
            for i, path in enumerate(numbered(goal.sheet, len(result.videos))):
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


def keep(states: list[State], stage: str | None, goal: RunOptions, pipe: Pipeline) -> InterruptedRun:
    """Save what an interrupted run has: one file, or one for each clip that was to be made alone."""
    count = len(states)
    paths = numbered(goal.state or goal.out.with_name(f"{goal.out.stem}.state.safetensors"), count)
    outs, sheets = numbered(goal.out, count), [None] * count if goal.sheet is None else numbered(goal.sheet, count)
    commands = []
    with undisturbed():
        for state, path, out, sheet in zip(states, paths, outs, sheets, strict=True):
            state.save(path)
            own = replace(
                goal, out=out, sheet=sheet, state=goal.state and path, start=goal.start and (stage or goal.start)
            )
            commands.append("  " + shlex.join(resume(path, own, pipe.setup.model)))
    reached = [f" after step {s['step']} of {len(s['sigmas']) - 1}" for s in states if "step" in s][-1:]
    return InterruptedRun(f"interrupted in {stage or 'the run'}{''.join(reached)}",
                f"everything until then is kept in {', '.join(map(str, paths))}",
                "\n".join(["Resume with:", *commands]))  # fmt: skip


def kept_in(run: Run, stage: str | None, goal: RunOptions) -> InterruptedRun:
    """What to say of an interrupted run whose folder has all that was done."""
    return InterruptedRun(f"interrupted in {stage or 'the run'}", f"everything until then is kept in {shown(run.path)}",
                f"Resume with:\n  {go_on(run, goal)}")  # fmt: skip


def go_on(run: Run, goal: RunOptions) -> str:
    """The command that goes on with a kept run, to the same end."""
    words = ["ditkit", "run", "--resume", shown(run.path)]
    part: list[tuple[str, object]] = [("--until", goal.until), ("--stop-at-step", goal.stop_at_step)]
    for flag, value in (*part, ("--save-state", goal.state)):
        words += [] if value is None else [flag, str(value)]
    if goal.out.absolute() != run.out:
        words += ["--out", str(goal.out)]
    if goal.sheet != run_sheet(run, goal.out) and not (goal.sheet and goal.sheet.absolute() == run_sheet(run, run.out)):
        words += ["--no-sheet"] if goal.sheet is None else ["--sheet", str(goal.sheet)]
    for key, value in (goal.setup or {}).items():
        words += [] if run.description.setup.get(key) == value or key == "model" else flag_of(key, value)
    return shlex.join(words)


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


def resume(path: Path, goal: RunOptions, model: str) -> list[str]:
    """The command that goes on from ``path`` to the same end. Settings from a config file or the environment are
    spelled out, because they may be gone by then."""
    words = ["ditkit", "run", "--from", str(path)]
    for flag, value in (("--start", goal.start), ("--until", goal.until), ("--stop-at-step", goal.stop_at_step),
                        ("--save-state", goal.state)):  # fmt: skip
        words += [] if value is None else [flag, str(value)]
    words += ["--out", str(goal.out), *(["--no-sheet"] if goal.sheet is None else ["--sheet", str(goal.sheet)])]
    for key, value in {**(goal.setup or {}), "model": model}.items():
        words += flag_of(key, value)
    return words


def undisturbed() -> AbstractContextManager[None]:
    """A second Ctrl-C does not break the saving that the first one began."""
    return handling(signal.SIG_IGN, signal.SIGINT, *ENDINGS)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def interruptible() -> AbstractContextManager[None]:
    """An ending session or a stopped job keeps the State like Ctrl-C; what the caller ignores (nohup) stays ignored."""
    return handling(interrupt, *(s for s in ENDINGS if signal.getsignal(s) == signal.SIG_DFL))


@contextmanager
def handling(handler: Any, *signals: signal.Signals) -> Iterator[None]:
    """Only the main thread may handle signals; in any other this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)

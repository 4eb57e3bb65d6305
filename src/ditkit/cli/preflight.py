"""Checks before a run computes anything: a part of it that leads nowhere, files that cannot be written.

Leaves out: whether the model and the settings fit, which shows when they are opened.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from ditkit.cli.run_options import RunOptions, numbered
from ditkit.errors import OutputError, PipelineError

if TYPE_CHECKING:
    from ditkit.contracts import Step
    from ditkit.pipeline import Pipeline
    from ditkit.state import State


def check(pipe: Pipeline, state: State, goal: RunOptions) -> tuple[list[Step], bool]:
    """The step table, and whether the run makes a video. Raises PipelineError, OutputError."""
    from ditkit.request import Request

    steps = pipe.steps(Request(**state["request"]))
    makes_video = check_goal(pipe, state, goal, len(steps))
    check_files(state, goal, makes_video)
    return steps, makes_video


def check_goal(pipe: Pipeline, state: State, goal: RunOptions, steps: int) -> bool:
    """Whether the run makes a video. Raises PipelineError for a part of it that leads nowhere."""
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


def check_files(state: State, goal: RunOptions, makes_video: bool) -> None:
    """Raise OutputError now for every file that could not be written later."""
    from ditkit.media import check_writable, files

    request, count = state["request"], len(state["prompt"])
    check_distinct(goal, count, makes_video)
    if makes_video:
        for path in numbered(goal.out, count):
            check_writable(path, width=request["width"], height=request["height"], fps=request["fps"])
    single = [("State", goal.state)] if goal.state is not None else []
    if makes_video and goal.sheet is not None:
        if goal.sheet.suffix.lower() != ".png":
            raise OutputError(f"writing the contact sheet {goal.sheet}", "it is a PNG", "Give it the suffix .png")
        single = [*(("contact sheet", path) for path in numbered(goal.sheet, count)), *single]
    for what, path in single:
        if path.is_dir():
            raise OutputError(f"writing the {what} {path}", "that is a folder", "Give the name of a file")
        files.probe(path)


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

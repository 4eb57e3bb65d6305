"""RunOptions: which part of a run a command wants, where its results go, and whether that can be.

Leaves out: the flags (``flags.py``), and whether the model and the settings fit, which shows when they are opened.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.errors import OutputError, PipelineError

if TYPE_CHECKING:
    from ditkit.contracts import Step
    from ditkit.pipeline import Pipeline
    from ditkit.receipt import Recorder
    from ditkit.runs import Run
    from ditkit.state import State


@dataclass(frozen=True)
class RunOptions:
    """``setup``: the settings that somebody gave. ``run``: the folder that keeps the States, if one does; ``kept``: one
    does, and may not be there yet. ``recorder``: that of a part which has run."""

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

    def sheets(self, count: int) -> list[Path]:
        return [] if self.sheet is None else numbered(self.sheet, count)


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


# --- before a run computes anything


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

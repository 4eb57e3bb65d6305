"""What is said and kept of an interrupted run: States on disk, and the commands that go on from there.

Leaves out: States of a run's own folder, which are there already (``runs``).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ditkit.cli.flags import flag_of
from ditkit.cli.run_options import RunOptions, numbered, sheet_for
from ditkit.cli.signals import undisturbed
from ditkit.errors import DitkitError

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline
    from ditkit.runs import Run
    from ditkit.state import State


class InterruptedRun(DitkitError):
    """Ctrl-C, with what was done until then on disk. The message ends with the commands that go on from there."""

    exit_code = 130

    def __str__(self) -> str:
        return f"{self.asked}: {self.found}. {self.do}"


def keep(states: list[State], stage: str | None, goal: RunOptions, pipe: Pipeline) -> InterruptedRun:
    """Save what an interrupted run has: one file, or one for each clip that was to be made alone."""
    count = len(states)
    paths = numbered(goal.state or goal.out.with_name(f"{goal.out.stem}.state.safetensors"), count)
    outs, sheets = numbered(goal.out, count), [None] * count if goal.sheet is None else numbered(goal.sheet, count)
    commands = []
    with undisturbed():
        for state, path, out, sheet in zip(states, paths, outs, sheets, strict=True):
            state.save(path)
            start = goal.start and (stage or goal.start)
            own = replace(goal, out=out, sheet=sheet, state=goal.state and path, start=start)
            commands.append(go_on_from(path, own, pipe.setup.model))
    reached = [f" after step {s['step']} of {len(s['sigmas']) - 1}" for s in states if "step" in s][-1:]
    return _interrupted(f"{stage or 'the run'}{''.join(reached)}", ", ".join(map(str, paths)), commands)


def kept_in(run: Run, stage: str | None, goal: RunOptions) -> InterruptedRun:
    """What to say of an interrupted run whose folder has all that was done."""
    return _interrupted(stage or "the run", shown(run.path), [go_on(run, goal)])


def _interrupted(where: str, kept: str, commands: Iterable[str]) -> InterruptedRun:
    found = f"everything until then is kept in {kept}"
    return InterruptedRun(f"interrupted in {where}", found, "\n  ".join(["Resume with:", *commands]))


def go_on(run: Run, goal: RunOptions) -> str:
    """The command that goes on with a kept run, to the same end."""
    words = ["ditkit", "run", "--resume", shown(run.path), *_part(goal)]
    if goal.out.absolute() != run.out:
        words += ["--out", str(goal.out)]
    if goal.sheet != run_sheet(run, goal.out) and not (goal.sheet and goal.sheet.absolute() == run_sheet(run, run.out)):
        words += _sheet(goal)
    for key, value in (goal.setup or {}).items():
        words += [] if run.description.setup.get(key) == value or key == "model" else flag_of(key, value)
    return shlex.join(words)


def go_on_from(path: Path, goal: RunOptions, model: str) -> str:
    """The command that goes on from the State in ``path`` to the same end. Settings from a config file or the
    environment are spelled out, because they may be gone by then."""
    start = [] if goal.start is None else ["--start", goal.start]
    words = ["ditkit", "run", "--from", str(path), *start, *_part(goal), "--out", str(goal.out), *_sheet(goal)]
    for key, value in {**(goal.setup or {}), "model": model}.items():
        words += flag_of(key, value)
    return shlex.join(words)


def _part(goal: RunOptions) -> list[str]:
    part = ("--until", goal.until), ("--stop-at-step", goal.stop_at_step), ("--save-state", goal.state)
    return [word for flag, value in part if value is not None for word in (flag, str(value))]


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

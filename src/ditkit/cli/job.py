"""Carry out one run from a State: check where it writes, show it, write what came out, keep what Ctrl-C cut off.

Leaves out: where the State and the settings come from (``opening.py``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.cli import expansion, preflight, resume, show
from ditkit.cli.run_options import RunOptions, numbered
from ditkit.errors import DitkitError
from ditkit.events import Event

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline, Result
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

    steps, makes_video = preflight.check(pipe, state, goal)
    out = show.console(stderr=goal.json)
    if not goal.quiet:
        out.print(show.step_table(steps))
    job: Job | None = None
    try:
        if goal.run is None:
            state, goal = expansion.before_run(pipe, state, goal, out)
        ran = () if goal.recorder is None else goal.recorder.done
        view = show.view(out, goal.quiet, pipe.look(), state["request"]["frames"], ran)
        part: dict[str, Any] = {"until": goal.until, "stop_at_step": goal.stop_at_step, "recorder": goal.recorder}
        part["listeners"] = [show.warn_of_truncation, note, *([] if view is None else [view])]
        alone = nullcontext(partial(pipe.run, state, start=goal.start, **part))
        with view or nullcontext(), alone if goal.run is None else goal.run.going(**part) as run:
            job = Job(run)
            yield job
        assert job.result is not None
        result = job.result if goal.run is None else goal.run.told(job.result)
        files = write(result, goal, makes_video)
    except Interrupted as e:
        if goal.run is not None:
            raise resume.kept_in(goal.run, e.stage, goal) from None
        several = samples.count(e.state) < samples.count(state)
        waiting = samples.split(state)[len(e.finished) + 1 :] if several else []
        raise resume.keep([*e.finished, e.state, *waiting], e.stage, goal, pipe) from None
    except DitkitError:
        if goal.run is not None:
            say(f"the run is kept; once that is mended, go on with:\n  {resume.go_on(goal.run, goal)}")
        raise
    except KeyboardInterrupt:  # outside the stages: before the first, or while the results were written
        if goal.run is not None:
            raise resume.kept_in(goal.run, None, goal) from None
        raise resume.keep([job.result.state if job and job.result else state], None, goal, pipe) from None
    report(result, files, goal, out)


def note(event: Event) -> None:
    """What a run found in its folder."""
    if event.name in ("run.note", "plug.changed"):
        say(event["text"])


note.ignores = frozenset({"prediction", "frames"})  # type: ignore[attr-defined]


def say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


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
        out.print(f"run    {resume.shown(goal.run.path)} (States kept: {count}, {show.size(size)})")
    for kind, paths in files.items():
        for path in paths:
            out.print(str(path) if goal.quiet else f"{kind[:-1]:6} {path}")

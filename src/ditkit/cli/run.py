"""``ditkit run``: a run in pieces. It stops after a stage or a step and goes on in another process.

With ``--run`` it keeps its States in a folder and goes on from there with ``--resume``, however it ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.flags import Prompt, RawSettings, to_path, with_settings
from ditkit.cli.job import carried_out
from ditkit.cli.keeping import Every, KeepSteps, NewRun, RunFolder
from ditkit.cli.opening import open_pipe, open_run, open_state
from ditkit.cli.resume import run_sheet
from ditkit.cli.run_options import Json, NoSheet, Out, Quiet, RunOptions, Sheet, default_out, sheet_for
from ditkit.errors import SetupError, StateError
from ditkit.setup import Setup

Source = Annotated[Path | None, typer.Option("--from", metavar="FILE", parser=to_path, help="Go on from this State.")]
Start = Annotated[str | None, typer.Option(metavar="STAGE", help="Begin with this stage, done or not.")]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="End with this stage.")]
SaveState = Annotated[
    Path | None, typer.Option(metavar="FILE", parser=to_path, help="Save the State at the end.")
]  # fmt: skip
StopAtStep = Annotated[int | None, typer.Option(metavar="K", help="End after K denoising steps.")]
Resume = Annotated[
    str | None, typer.Option(metavar="NAME|PATH", help="Go on with the run that is kept in this folder.")
]  # fmt: skip


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


@with_settings
def run(
    given: RawSettings,
    prompt: Prompt = None,
    source: Source = None,
    start: Start = None,
    until: Until = None,
    save_state: SaveState = None,
    stop_at_step: StopAtStep = None,
    folder: RunFolder = None,
    resume: Resume = None,
    every: Every = None,
    keep_steps: KeepSteps = None,
    out: Out = None,
    sheet: Sheet = None,
    no_sheet: NoSheet = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a part of a clip, or go on from a saved State: the same bits as in one go."""
    _one_of({"--from": source, "--run": folder, "--resume": resume})
    _only_with("--run", folder, {"--every": every, "--keep-steps": keep_steps})
    if start is not None and source is None:
        raise StateError(f"--start {start}", "there is no State to begin from", "Add --from FILE")
    goal = RunOptions(out or Path(), None, save_state, start, until, stop_at_step, quiet=quiet, json=as_json)
    if resume is not None:
        kept, settled = open_run(resume, given)
        pipe, state, out, otherwise = kept.pipe, kept.state(), out or kept.out, run_sheet(kept, out or kept.out)
        chosen = sheet_for(out, sheet, no_sheet)
        goal = goal.at(out, chosen if no_sheet or sheet else otherwise, settled.of(Setup), kept)
    else:
        if source is None:
            pipe, request, settled = open_pipe(given)
            state = pipe.begin(request)
        else:
            pipe, state, settled = open_state(source, given)
        if folder is not None:
            new = NewRun.at(folder, every, keep_steps, out, sheet, no_sheet)
            state, goal = new.begin(pipe, state, goal, settled)
        else:
            out = out or default_out(state["prompt"][0], state["seed"][0])
            goal = goal.at(out, sheet_for(out, sheet, no_sheet), settled.of(Setup))
    with carried_out(pipe, state, goal) as job:
        job.result = job.run()


def _one_of(ways: Mapping[str, object]) -> None:
    named = [f"{flag} {value}" for flag, value in ways.items() if value is not None]
    if len(named) > 1:
        raise StateError(" with ".join(named), "each says where the run begins", "Give one of them")


def _only_with(flag: str, value: object, options: Mapping[str, object]) -> None:
    named = [f"{option} {given}" for option, given in options.items() if given is not None]
    if named and value is None:
        raise SetupError(named[0], f"it says what a new run keeps, and there is no {flag}", f"Add {flag} NAME")

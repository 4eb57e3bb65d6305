"""``ditkit fork RUN``: a new run that keeps of another one all that still fits its changed settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditkit.cli import job, show
from ditkit.cli.flags import RawSettings, with_settings
from ditkit.cli.keeping import Every, KeepSteps, NewRun, RunFolder
from ditkit.cli.opening import load, settle
from ditkit.cli.resume import shown
from ditkit.cli.run_options import Json, NoSheet, Out, Quiet, RunOptions, Sheet
from ditkit.config import Layer
from ditkit.errors import DitkitError

if TYPE_CHECKING:
    from ditkit.runs import Parent, Run


class Nothing(DitkitError):
    """Ctrl-C before the fork was there."""

    exit_code = 130


def add_to(app: typer.Typer) -> None:
    app.command("fork")(fork)


@with_settings
def fork(
    given: RawSettings,
    source: Annotated[str, typer.Argument(metavar="RUN", help="The run to fork: its NAME in runs/, or its path.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Another prompt.", show_default=False)] = None,
    at_step: Annotated[
        int | None, typer.Option(metavar="K", help="Go on from the State after K steps. Default: keep what still fits.")
    ] = None,
    clip: Annotated[int | None, typer.Option(metavar="N", help="Which clip, of a run of several: 0, 1, ...")] = None,
    folder: RunFolder = None,
    every: Every = None,
    keep_steps: KeepSteps = None,
    out: Out = None,
    sheet: Sheet = None,
    no_sheet: NoSheet = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Begin a new run where another one stands, or stood, with changed settings."""
    from ditkit.execution.place import Interrupted
    from ditkit.runs import Run, located
    from ditkit.runs.fork import as_parent, prepared, request_of, which_clip

    parent = Run.open(source)
    before = request_of(parent, which_clip(parent, clip))
    replaced = ("steps", "shift") if before["sigmas"] is not None else ()
    below = {k: v for k, v in before.items() if k not in replaced}
    settled, opened = settle(given, Layer.of({**below, **parent.description.setup}, f"run {parent.path}"))
    path = next_to(parent) if folder is None else located(folder)
    new = NewRun.at(path, every, keep_steps, out, sheet, no_sheet)
    pipe, request = load(opened), settled.request().model_dump()
    if before["sigmas"] is not None and request["sigmas"] == before["sigmas"]:
        request |= {"steps": before["steps"], "shift": before["shift"]}
    goal = RunOptions(path, None, quiet=quiet, json=as_json)
    try:
        state, origin = prepared(
            parent, request, at_step=at_step, clip=clip, pipe=pipe, tell=job.say, listeners=[show.warn_of_truncation]
        )
        for line in [] if quiet else told(origin):
            show.console(stderr=as_json).print(line)
        state, goal = new.begin(pipe, state, goal, settled, origin, **as_parent(parent))
    except (Interrupted, KeyboardInterrupt):
        raise Nothing(f"forking {source}", "it was interrupted before the fork was there", "Fork it again") from None
    with job.carried_out(pipe, state, goal) as forked:
        forked.result = forked.run()


def next_to(parent: Run) -> Path:
    """``NAME-1`` beside the parent, or the next number that is free."""
    number = 1
    while (path := parent.path.with_name(f"{parent.name}-{number}")).exists():
        number += 1
    return path


def told(above: Parent) -> list[str]:
    where = "" if above.step is None else f" at step {above.step}"
    lines = [f"fork   {shown(Path(above.path))}{where}"]
    for key, (old, new) in above.changed.items():
        lines.append(f"       {key} {show.value(old)} -> {show.value(new)}")
    return lines

"""``ditkit fork RUN``: a new run that keeps of another one all that still fits its changed settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit.cli import expansion, job, show
from ditkit.cli.flags import RawSettings, settle, with_settings
from ditkit.cli.generate import load
from ditkit.cli.run import Every, KeepSteps, RunFolder, keeping, own_setup, results, unless_begun
from ditkit.config import Layer
from ditkit.errors import DitkitError
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.runs import Run
    from ditkit.runs.description import Parent


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
    out: job.Out = None,
    sheet: job.Sheet = None,
    no_sheet: job.NoSheet = False,
    quiet: job.Quiet = False,
    as_json: job.Json = False,
) -> None:
    """Begin a new run where another one stands, or stood, with changed settings."""
    from ditkit.execution.place import Interrupted
    from ditkit.runs import Run, located
    from ditkit.runs.fork import as_parent, prepared, request_of, which_clip
    from ditkit.runs.run import check_new

    parent = Run.open(source)
    before = request_of(parent, which_clip(parent, clip))
    replaced = ("steps", "shift") if before["sigmas"] is not None else ()
    below = {k: v for k, v in before.items() if k not in replaced}
    settled, _ = settle(given, Layer.of({**below, **parent.description.setup}, f"run {parent.path}"))
    path = next_to(parent) if folder is None else located(folder)
    check_new(path, **keeping(every, keep_steps))
    pipe, request = load(settled), settled.request().model_dump()
    if before["sigmas"] is not None and request["sigmas"] == before["sigmas"]:
        request |= {"steps": before["steps"], "shift": before["shift"]}
    clip_file = out or path / "clip.mp4"
    goal = job.RunOptions(clip_file, job.sheet_for(clip_file, sheet, no_sheet), setup=settled.of(Setup), quiet=quiet,
                    json=as_json, kept=True)  # fmt: skip
    console = show.console(stderr=as_json)
    try:
        state, origin = prepared(
            parent, request, at_step=at_step, clip=clip, pipe=pipe, tell=job.say, listeners=[show.warn_of_truncation]
        )
        with unless_begun(path):
            job.check(pipe, state, goal)
            for line in [] if quiet else told(origin):
                console.print(line)
            state, goal = expansion.before_run(pipe, state, goal, console)
    except (Interrupted, KeyboardInterrupt):
        raise Nothing(f"forking {source}", "it was interrupted before the fork was there", "Fork it again") from None
    run = Run.begin(path, pipe, state, parent=origin, setup=own_setup(settled), **results(out, sheet, no_sheet),
                    **{**as_parent(parent), **keeping(every, keep_steps)})  # fmt: skip
    job.carry_out(pipe, state, goal.at(goal.out, goal.sheet, settled.of(Setup), run))


def next_to(parent: Run) -> Path:
    """``NAME-1`` beside the parent, or the next number that is free."""
    number = 1
    while (path := parent.path.with_name(f"{parent.name}-{number}")).exists():
        number += 1
    return path


def told(above: Parent) -> list[str]:
    where = "" if above.step is None else f" at step {above.step}"
    lines = [f"fork   {job.shown(Path(above.path))}{where}"]
    for key, (old, new) in above.changed.items():
        lines.append(f"       {key} {_short(old)} -> {_short(new)}")
    return lines


def _short(value: Any) -> str:
    return show.value(value)

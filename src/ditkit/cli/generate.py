"""``ditkit generate PROMPT``: a clip and its contact sheet."""

from __future__ import annotations

import typer

from ditkit.cli.flags import Prompt, RawSettings, with_settings
from ditkit.cli.job import carried_out
from ditkit.cli.opening import open_pipe
from ditkit.cli.run_options import Json, NoSheet, Out, Quiet, RunOptions, Sheet, default_out, sheet_for
from ditkit.setup import Setup


def add_to(app: typer.Typer) -> None:
    app.command("generate")(generate)


@with_settings
def generate(
    given: RawSettings,
    prompt: Prompt = None,
    out: Out = None,
    sheet: Sheet = None,
    no_sheet: NoSheet = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a clip from a prompt."""
    pipe, request, settled = open_pipe(given)
    state = pipe.begin(request)
    out = out or default_out(state["prompt"][0], state["seed"][0])
    sheet = sheet_for(out, sheet, no_sheet)
    goal = RunOptions(out, sheet, setup=settled.of(Setup), quiet=quiet, json=as_json)
    with carried_out(pipe, state, goal) as job:
        job.result = job.run()

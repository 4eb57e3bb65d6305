"""``ditkit generate PROMPT``: a clip and its contact sheet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ditkit.cli import job
from ditkit.cli.flags import Prompt, RawSettings, settle, with_settings
from ditkit.request import Request
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.config import Settled
    from ditkit.pipeline import Pipeline


def add_to(app: typer.Typer) -> None:
    app.command("generate")(generate)


@with_settings
def generate(
    given: RawSettings,
    prompt: Prompt = None,
    out: job.Out = None,
    sheet: job.Sheet = None,
    no_sheet: job.NoSheet = False,
    quiet: job.Quiet = False,
    as_json: job.Json = False,
) -> None:
    """Make a clip from a prompt."""
    pipe, request, settled = open_pipe(given)
    state = pipe.begin(request)
    out = out or job.default_out(state["prompt"][0], state["seed"][0])
    goal = job.RunOptions(out, job.sheet_for(out, sheet, no_sheet), setup=settled.of(Setup), quiet=quiet, json=as_json)
    job.carry_out(pipe, state, goal)


def open_pipe(given: RawSettings) -> tuple[Pipeline, Request, Settled]:
    """Everything settled and checked; no weights are loaded."""
    settled, model = settle(given)
    request = model.request(settled.of(Request))
    return load(settled), request, settled


def load(settled: Settled) -> Pipeline:
    """The pipe of the settled Setup. Raises SetupError for a device that is not there, now rather than half-way."""
    import ditkit

    pipe = ditkit.load(**settled.setup().model_dump())
    for component in pipe.model.parts:  # of those that lie at a host the host knows
        pipe.setup.device_of(component)
    return pipe

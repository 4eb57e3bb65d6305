"""``ditkit run``: a run in pieces. It stops after a stage or a step and goes on in another process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditkit.cli import job
from ditkit.cli.flags import Given, Prompt, kebab, settle, to_path, with_settings
from ditkit.cli.generate import load, open_pipe
from ditkit.config import Layer, Settled
from ditkit.errors import RequestError, StateError
from ditkit.request import Request
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.pipe import Pipe
    from ditkit.state import State


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


@with_settings
def run(
    given: Given,
    prompt: Prompt = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", parser=to_path, help="Go on from this State.")
    ] = None,
    start: Annotated[str | None, typer.Option(metavar="STAGE", help="Begin with this stage, done or not.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="End with this stage.")] = None,
    save_state: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=to_path, help="Save the State at the end.")
    ] = None,
    stop_at_step: Annotated[int | None, typer.Option(metavar="K", help="End after K denoising steps.")] = None,
    out: job.Out = None,
    sheet: job.Sheet = None,
    no_sheet: job.NoSheet = False,
    quiet: job.Quiet = False,
    as_json: job.Json = False,
) -> None:
    """Make a part of a clip, or go on from a saved State: the same bits as in one go."""
    if source is None:
        if start is not None:
            raise StateError(f"--start {start}", "there is no State to begin from", "Add --from FILE")
        pipe, request, settled = open_pipe(given)
        state = pipe.begin(request)
    else:
        pipe, state, settled = open_state(source, given)
    out = out or job.default_out(state["prompt"][0], state["seed"][0])
    goal = job.Goal(out, job.sheet_for(out, sheet, no_sheet), save_state, start, until, stop_at_step,
                    settled.of(Setup), quiet, as_json)  # fmt: skip
    job.carry_out(pipe, state, goal)


def open_state(source: Path, given: Given) -> tuple[Pipe, State, Settled]:
    """The State and its model. What to make stands in the State; how to make it may be set anew."""
    from ditkit.state import State

    if typed := [key for key in given.named() if key in Request.model_fields]:
        name = "PROMPT" if typed[0] == "prompt" else f"--{kebab(typed[0])}"
        raise RequestError(f"{name} with --from {source}", "a State goes on with the request that it was begun with",
                           "Leave it out, or begin a new run")  # fmt: skip
    state = State.load(source)
    for name in ("request", "model", "prompt", "seed"):
        if name not in state:
            raise StateError(
                f"going on from {source}", f"it holds no {name}", "Save one with `ditkit run --save-state`"
            )
    settled, _ = settle(given, Layer.of({"model": state["model"]["name"]}, f"State {source}"))
    asked = settled.request()
    for key, value in state["request"].items():
        said = settled.said.get(key, ())
        if said and not said[-1][0].startswith("model ") and getattr(asked, key) != value:
            raise RequestError(f"{key}={getattr(asked, key)!r} ({settled.origins[key]}) with --from {source}",
                               f"the State was begun with {value!r}", "Take that away, or begin a new run")  # fmt: skip
    return load(settled), state, settled

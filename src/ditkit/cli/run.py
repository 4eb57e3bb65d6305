"""``ditkit run``: a run in pieces. It stops after a stage or a step and goes on in another process.

With ``--run`` it keeps its States in a folder and goes on from there with ``--resume``, however it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit.cli import expansion, job, show
from ditkit.cli.flags import Prompt, RawSettings, kebab, settle, to_path, with_settings
from ditkit.cli.generate import load, open_pipe
from ditkit.config import Layer, Settled
from ditkit.errors import RequestError, SetupError, StateError
from ditkit.prompting import templates
from ditkit.request import Request
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline
    from ditkit.runs import Run
    from ditkit.state import State

RunFolder = Annotated[
    str | None, typer.Option("--run", metavar="NAME|PATH", help="Keep the run in this folder; a NAME lies in runs/.")
]
Every = Annotated[
    int | None, typer.Option(metavar="K", help="With --run: keep a State every K denoising steps. Default: 1.")
]
KeepSteps = Annotated[
    str | None,
    typer.Option(
        metavar="last|all",
        help="With --run: keep the newest State only, or one for each kept step, to fork from. Default: last.",
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


@with_settings
def run(
    given: RawSettings,
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
    folder: RunFolder = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Go on with the run that is kept in this folder.")
    ] = None,
    every: Every = None,
    keep_steps: KeepSteps = None,
    out: job.Out = None,
    sheet: job.Sheet = None,
    no_sheet: job.NoSheet = False,
    quiet: job.Quiet = False,
    as_json: job.Json = False,
) -> None:
    """Make a part of a clip, or go on from a saved State: the same bits as in one go."""
    given_ways = {"--from": source, "--run": folder, "--resume": resume}
    _one_of(given_ways)
    _only_with("--run", folder, {"--every": every, "--keep-steps": keep_steps})
    if start is not None and source is None:
        raise StateError(f"--start {start}", "there is no State to begin from", "Add --from FILE")
    goal = job.RunOptions(out or Path(), None, save_state, start, until, stop_at_step, quiet=quiet, json=as_json)
    if resume is not None:
        run, settled = open_run(resume, given)
        where = destination(run.out if out is None else out, sheet, no_sheet, job.run_sheet(run, out or run.out))
        job.carry_out(run.pipe, run.state(), goal.at(*where, settled.of(Setup), run))
        return
    if source is None:
        pipe, request, settled = open_pipe(given)
        state = pipe.begin(request)
    else:
        pipe, state, settled = open_state(source, given)
    if folder is not None:
        begin(pipe, state, goal, settled, folder, out, sheet, no_sheet, every, keep_steps)
        return
    out = out or job.default_out(state["prompt"][0], state["seed"][0])
    job.carry_out(pipe, state, goal.at(out, job.sheet_for(out, sheet, no_sheet), settled.of(Setup)))


def begin(
    pipe: Pipeline,
    state: State,
    goal: job.RunOptions,
    settled: Settled,
    folder: str,
    out: Path | None,
    sheet: Path | None,
    no_sheet: bool,
    every: int | None,
    keep_steps: str | None,
) -> None:
    """A new run in its folder, once all that can be known to go wrong has not."""
    from ditkit.runs import Run, located
    from ditkit.runs.run import check_new

    check_new(located(folder), **keeping(every, keep_steps))
    clip = out or located(folder) / "clip.mp4"
    goal = goal.at(clip, job.sheet_for(clip, sheet, no_sheet), settled.of(Setup), kept=True)
    with unless_begun(located(folder)):
        job.check(pipe, state, goal)
        state, goal = expansion.before_run(pipe, state, goal, show.console(stderr=goal.json))
    run = Run.begin(folder, pipe, state, **keeping(every, keep_steps), **results(out, sheet, no_sheet),
                    setup=own_setup(settled))  # fmt: skip
    job.carry_out(pipe, state, goal.at(goal.out, goal.sheet, settled.of(Setup), run))


@contextmanager
def unless_begun(folder: Path) -> Iterator[None]:
    """What fails before the run is there leaves no empty folder that the checks made."""
    new = not folder.exists()
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if new:
                folder.rmdir()
        raise


def keeping(every: int | None, keep_steps: str | None) -> dict[str, Any]:
    """What somebody said of it, as ``Run.begin`` takes it."""
    return {k: v for k, v in (("every", every), ("keep_steps", keep_steps)) if v is not None}


def results(out: Path | None, sheet: Path | None, no_sheet: bool) -> dict[str, Any]:
    """Where results go, as ``Run.begin`` takes it."""
    return {"out": out, "sheet": str(sheet.absolute()) if sheet is not None else not no_sheet}


def own_setup(settled: Settled) -> dict[str, Any]:
    """The settings to open the model of a run with, from every folder."""
    from ditkit.assembly import placed
    from ditkit.runs.run import given

    return given(placed(settled.setup()))


def destination(out: Path, sheet: Path | None, no_sheet: bool, otherwise: Path | None) -> tuple[Path, Path | None]:
    """The clip and the contact sheet of a run that goes on."""
    chosen = job.sheet_for(out, sheet, no_sheet)
    return out, chosen if no_sheet or sheet is not None else otherwise


def _one_of(ways: Mapping[str, object]) -> None:
    named = [f"{flag} {value}" for flag, value in ways.items() if value is not None]
    if len(named) > 1:
        raise StateError(" with ".join(named), "each says where the run begins", "Give one of them")


def _only_with(flag: str, value: object, options: Mapping[str, object]) -> None:
    named = [f"{option} {given}" for option, given in options.items() if given is not None]
    if named and value is None:
        raise SetupError(named[0], f"it says what a new run keeps, and there is no {flag}", f"Add {flag} NAME")


def open_state(source: Path, given: RawSettings) -> tuple[Pipeline, State, Settled]:
    """The State and its model. What to make stands in the State; how to make it may be set anew."""
    from ditkit.state import State

    _nothing_to_make(given, f"--from {source}", "a State")
    state = State.load(source)
    for name in ("request", "model", "prompt", "seed"):
        if name not in state:
            raise StateError(
                f"going on from {source}", f"it holds no {name}", "Save one with `ditkit run --save-state`"
            )
    below = Layer.of({"model": state["model"]["name"]}, f"State {source}")
    settled = _goes_on(given, below, state["request"], f"--from {source}", "the State")
    return load(settled), state, settled


def open_run(name: str, given: RawSettings) -> tuple[Run, Settled]:
    """A kept run, with its model. What to make stands in its folder; how to make it may be set anew."""
    from ditkit.runs import Run

    _nothing_to_make(given, f"--resume {name}", "a run")
    run = Run.open(name)
    below = Layer.of(run.description.setup, f"run {run.path}")
    settled = _goes_on(given, below, run.description.request, f"--resume {name}", "the run")
    return Run.open(name, load(settled)), settled


def _nothing_to_make(given: RawSettings, flag: str, what: str) -> None:
    """Raise RequestError when the command line itself says what to make."""
    if typed := [key for key in given.named() if key in Request.model_fields]:
        name = "PROMPT" if typed[0] == "prompt" else f"--{kebab(typed[0])}"
        raise RequestError(f"{name} with {flag}", f"{what} goes on with the request that it was begun with",
                           "Leave it out, or begin a new run")  # fmt: skip


def _goes_on(given: RawSettings, below: Layer, request: Mapping[str, Any], flag: str, what: str) -> Settled:
    """The settings of compute, over those that lie ``below``. Raises RequestError where a config file or the
    environment asks for something else than ``request``."""
    settled, _ = settle(given, below)
    asked = templates.placed(settled.request())
    for key, value in request.items():
        said = settled.said.get(key, ())
        if said and not said[-1][0].startswith("model ") and getattr(asked, key) != value:
            raise RequestError(f"{key}={getattr(asked, key)!r} ({settled.origins[key]}) with {flag}",
                               f"{what} was begun with {value!r}", "Take that away, or begin a new run")  # fmt: skip
    return settled

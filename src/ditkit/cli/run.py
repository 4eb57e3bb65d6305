"""The commands that make a clip: ``ditkit generate``, ``demo``, ``run``, which stops after a stage or a step and goes
on in another process, ``fork``, which keeps of another run all that still fits its changed settings, and ``replay``.

With ``--run`` a run keeps its States in a folder and goes on from there with ``--resume``, however it ended."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit import pictures
from ditkit.cli import expand, flags, job, show
from ditkit.cli.flags import OutputOption, PathArgument, PathOption, RawSettings, RunOptions, sheet_for, with_settings
from ditkit.cli.naming import default_out, free_out, leaves
from ditkit.cli.opening import load, model_name, open_pipe, open_run, open_state, say_what_was_drawn, settle
from ditkit.config import Layer, Settled
from ditkit.errors import OutputError, RequestError, SetupError, StateError
from ditkit.hiding import printable
from ditkit.setup import Setup
from ditkit.trust import OUT, PICTURES, check_allowed, check_named

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline
    from ditkit.runs import Parent, Run
    from ditkit.state import State


DEMO = Path("outputs/demo.mp4")


@with_settings
def generate(
    given: RawSettings, prompt: flags.Prompt = None, out: flags.Out = None, sheet: flags.Sheet = None,
    no_sheet: flags.NoSheet = False, quiet: flags.Quiet = False, as_json: flags.Json = False,
) -> None:  # fmt: skip
    """Make a clip from a prompt."""
    pipe, request, settled = open_pipe(given)
    state = pipe.begin(request)
    with free_out(default_out(state["prompt"][0], state["seed"][0]), len(state["prompt"]), out) as free:
        goal = RunOptions(free, sheet_for(free, sheet, no_sheet), setup=settled.of(Setup), quiet=quiet, json=as_json)
        with job.carried_out(pipe, state, goal) as made:
            made.result = made.run()


def demo(
    prompt: Annotated[str, typer.Argument(help="What the clip should show.")] = (
        "a red circle moving left on a black background"
    ),
    seed: Annotated[int, typer.Option(help="Another seed gives another clip.")] = 7,
    out: Annotated[
        Path | None,
        OutputOption(metavar="PATH", help="Default: outputs/demo.mp4, or the next name that is free."),
    ] = None,
    model: flags.ModelName = "shapes",
    quiet: flags.Quiet = False,
) -> None:
    """Make a clip on the embedded model, in seconds."""
    pipe, request, _ = open_pipe(RawSettings({"prompt": [prompt], "seed": [str(seed)], "model": [model]}))
    if not quiet:
        print(printable(f'"{request.prompt}", seed {request.seed}, model {model}'), flush=True)
    with free_out(DEMO, 1, out) as free:
        goal = RunOptions(free, sheet_for(free, None, False), quiet=quiet)
        with job.carried_out(pipe, pipe.begin(request), goal) as made:
            made.result = made.run()


@with_settings
def run(
    given: RawSettings,
    prompt: flags.Prompt = None,
    source: Annotated[Path | None, PathOption("--from", metavar="FILE", help="Go on from this State.")] = None,
    start: Annotated[str | None, typer.Option(metavar="STAGE", help="Begin with this stage, done or not.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="End with this stage.")] = None,
    save_state: Annotated[Path | None, OutputOption(metavar="FILE", help="Save the State at the end.")] = None,
    stop_at_step: Annotated[int | None, typer.Option(metavar="K", help="End after K denoising steps.")] = None,
    folder: flags.RunFolder = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Go on with the run that is kept in this folder.")
    ] = None,
    every: flags.Every = None,
    keep_steps: flags.KeepSteps = None,
    out: flags.Out = None,
    sheet: flags.Sheet = None,
    no_sheet: flags.NoSheet = False,
    quiet: flags.Quiet = False,
    as_json: flags.Json = False,
) -> None:
    """Make a part of a clip, or go on from a saved State: the same bits as in one go."""
    ways = {"--from": source, "--run": folder, "--resume": resume}
    if len(named := [f"{flag} {value}" for flag, value in ways.items() if value is not None]) > 1:
        raise StateError(" with ".join(named), "each says where the run begins", "Give one of them")
    keeping = given_of(every=every, keep_steps=keep_steps)
    for key, value in keeping.items() if folder is None else ():
        found = "it says what a new run keeps, and there is no --run"
        raise SetupError(f"--{flags.kebab(key)} {value}", found, "Add --run NAME")
    if start is not None and source is None:
        raise StateError(f"--start {start}", "there is no State to begin from", "Add --from FILE")
    goal = RunOptions(out or Path(), None, save_state, start, until, stop_at_step, quiet=quiet, json=as_json)
    with ExitStack() as names:
        names.enter_context(job.naming(resume if source is None else str(source)))
        if resume is not None:
            kept, settled = open_run(resume, given)
            pipe, state = kept.pipe, kept.state()
            check_results(kept, out is not None, no_sheet or sheet is not None, given.allowed)
            out = out or kept.out
            chosen = sheet_for(out, sheet, no_sheet) if no_sheet or sheet else job.run_sheet(kept, out)
            goal = replace(goal, out=out, sheet=chosen, setup=settled.of(Setup), run=kept, kept=True)
        else:
            if source is None:
                pipe, request, settled = open_pipe(given)
                state = pipe.begin(request)
            else:
                pipe, state, settled = open_state(source, given)
            if folder is not None:
                from ditkit.runs import located

                state, goal = begun(located(folder), pipe, state, goal, settled, out, sheet, no_sheet, **keeping)
            else:
                wanted = default_out(state["prompt"][0], state["seed"][0])
                out = names.enter_context(free_out(wanted, len(state["prompt"]), out))
                goal = replace(goal, out=out, sheet=sheet_for(out, sheet, no_sheet), setup=settled.of(Setup))
        with job.carried_out(pipe, state, goal) as made:
            made.result = made.run()


@with_settings
def fork(
    given: RawSettings,
    source: Annotated[str, typer.Argument(metavar="RUN", help="The run to fork: its NAME in runs/, or its path.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Another prompt.", show_default=False)] = None,
    at_step: Annotated[
        int | None, typer.Option(metavar="K", help="Go on from the State after K steps. Default: keep what still fits.")
    ] = None,
    clip: Annotated[int | None, typer.Option(metavar="N", help="Which clip, of a run of several: 0, 1, ...")] = None,
    folder: flags.RunFolder = None,
    every: flags.Every = None,
    keep_steps: flags.KeepSteps = None,
    out: flags.Out = None,
    sheet: flags.Sheet = None,
    no_sheet: flags.NoSheet = False,
    quiet: flags.Quiet = False,
    as_json: flags.Json = False,
) -> None:
    """Begin a new run where another one stands, or stood, with changed settings."""
    from ditkit.execution.place import Interrupted
    from ditkit.runs import Run, located
    from ditkit.runs.fork import prepared, request_of, which_clip
    from ditkit.runs.run import check_new

    with job.naming(source):
        parent = Run.open(source)
        before = request_of(parent, which_clip(parent, clip))
        replaced = ("steps", "shift") if before["sigmas"] is not None else ()
        below = {k: v for k, v in before.items() if k not in replaced}
        settled, opened = settle(given, Layer.of({**below, **parent.description.setup}, f"run {parent.path}"))
        path = next_to(parent.path) if folder is None else located(folder)
        about = parent.description
        keeping = {"every": about.every, "keep_steps": about.keep_steps, **given_of(every=every, keep_steps=keep_steps)}
        check_new(path, **keeping)
        pipe, request = load(opened), settled.request().model_dump()
        say_what_was_drawn(settled)
        named = pictures.FIELDS if PICTURES in given.allowed else given.named()
        if before["sigmas"] is not None and request["sigmas"] == before["sigmas"]:
            request |= {"steps": before["steps"], "shift": before["shift"]}
        goal = RunOptions(path, None, quiet=quiet, json=as_json)
        try:
            state, origin = prepared(
                parent, request, pipe, at_step, clip, {}, [show.warn_of_truncation], show.say, named
            )
            if not quiet:
                where = "" if origin.step is None else f" at step {origin.step}"
                changes = [
                    f"       {k} {show.value(old)} -> {show.value(new)}" for k, (old, new) in origin.changed.items()
                ]
                for line in [f"fork   {job.shown(Path(origin.path))}{where}", *changes]:
                    show.console(stderr=as_json).print(line)
            state, goal = begun(path, pipe, state, goal, settled, out, sheet, no_sheet, origin, **keeping)
        except (Interrupted, KeyboardInterrupt):
            found = "it was interrupted before the fork was there"
            raise job.InterruptedRun(f"forking {source}", found, "Fork it again.") from None
        with job.carried_out(pipe, state, goal) as made:
            made.result = made.run()


def check_results(kept: Run, out: bool, sheet: bool, allowed: Sequence[str]) -> None:
    """Raise StateError where the run's folder alone says that something outside of it is written. ``out``, ``sheet``:
    whether the person named them."""
    asked, places = f"going on with the run {kept.path}", {"--out": "" if out else kept.description.out}
    places["--sheet"] = "" if sheet or isinstance(kept.description.sheet, bool) else kept.description.sheet
    for flag, place in places.items():
        if place and not kept.decides(place):
            check_named(OUT, flag, place, allowed, asked)


def next_to(parent: Path) -> Path:
    """``NAME-1`` beside the parent, or the next number that is free."""
    names = (parent.with_name(f"{parent.name}-{number}") for number in itertools.count(1))
    return next(path for path in names if not os.path.exists(path))


def given_of(**values: Any) -> dict[str, Any]:
    """What somebody gave."""
    return {name: value for name, value in values.items() if value is not None}


def begun(
    path: Path, pipe: Pipeline, state: State, goal: RunOptions, settled: Settled, out: Path | None, sheet: Path | None,
    no_sheet: bool, parent: Parent | None = None, **keeping: Any,
) -> tuple[State, RunOptions]:  # fmt: skip
    """A new run in a folder of its own, once all that can be known to go wrong has not. ``keeping`` as for
    ``Run.begin``."""
    from ditkit.assembly import placed
    from ditkit.runs import Run
    from ditkit.runs.folder import given
    from ditkit.runs.run import check_new

    check_new(path, **keeping)
    clip, new = out or path / "clip.mp4", not os.path.exists(path)
    if out is None and (theirs := [file for file in leaves(clip, len(state["prompt"])) if os.path.lexists(file)]):
        do = "Name another folder, or say with --out where the clip goes"
        raise OutputError(f"beginning the run {path}", f"{theirs[0].name} is there, from before", do)
    goal = replace(goal, out=clip, sheet=sheet_for(clip, sheet, no_sheet), setup=settled.of(Setup), kept=True)
    try:
        job.check(pipe, state, goal)
        state, goal = expand.before_run(pipe, state, goal, show.console(stderr=goal.json))
    except BaseException:  # leaves no empty folder that the checks made
        with suppress(OSError):
            if new:
                path.rmdir()
        raise
    chosen = not no_sheet if sheet is None else str(sheet.absolute())
    setup = given(placed(settled.setup()))  # from every folder
    kept = Run.begin(path, pipe, state, **keeping, out=out, sheet=chosen, setup=setup, parent=parent)
    return state, replace(goal, run=kept)


def replay(
    file: Annotated[Path, PathArgument(metavar="FILE", help="A clip that ditkit wrote, or its .json.")],
    out: Annotated[Path | None, OutputOption(metavar="PATH", help="Write the clip that was made again here.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER|NAME", help="Where its model is now. Default: where it was then.")
    ] = None,
    picture: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Where a picture of its request is now, such as image=a.png."),
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Run all stages here, though some ran at hosts or in other processes.")
    ] = False,
    source: Annotated[
        Path | None, PathOption("--from", metavar="FILE", help="Go on from the State of a replay that was cut off.")
    ] = None,
    quiet: flags.Quiet = False,
    plugs: flags.Plugs = None,
    allowed: flags.Allowed = None,
) -> int:
    """Make a clip again and compare: exit code 0 when every pixel is the same, 1 when not."""
    from ditkit import media
    from ditkit import replay as replays
    from ditkit.state import State

    script, allow = replays.read(file), check_allowed(allowed or ())
    request = script.request
    if out is not None:
        media.check_writable(out, width=request.width, height=request.height, fps=request.fps)
    pipe = replays.prepare(script, None if model is None else model_name(model), here, plugs or (), allow)
    for difference in [*replays.plug_differences(script, pipe), *replays.machine_differences(script.manifest)]:
        show.say(difference)
    console, begun = show.console(), None if source is None else State.load(source)
    given = {"--picture": picture, "--plug": plugs, "--allow-from-file": allow, "--out": out, "--model": model}
    words = [str(word) for flag, values in given.items() for value in _listed(values) for word in (flag, value)]
    again = ["replay", str(file), *words, *(["--here"] if here else [])]
    shown = show.view(console, quiet, pipe.look(), request.frames)
    with job.kept_for(again, out or file, begun), shown as listeners:
        replayed = replays.replay(script, pipe, listeners, named_pictures(picture or []), allow, begun)
    if out is not None:
        clip = replayed.result.manifests[script.clip]
        written = media.write_video(out, replayed.result.videos[script.clip], request.fps, clip)
        console.print(f"clip   {written}")
    if replayed.identical:
        console.print(f"identical: {file} was made again, bit for bit")
        return 0
    console.print(f"different: {file} was not made again")
    for difference in replayed.differences:
        console.print(f"  {difference}")
    return 1


def _listed(values: Any) -> list[Any]:
    return [] if values is None else [values] if isinstance(values, str | Path) else [*values]


def named_pictures(texts: list[str]) -> dict[str, str | list[str]]:
    """``image=a.png`` and the like; several of ``reference_images`` are a list. Raises RequestError."""
    found: dict[str, str | list[str]] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or name not in pictures.FIELDS:
            do = f"Write NAME=FILE with one of {', '.join(pictures.FIELDS)}"
            raise RequestError(f"--picture {text}", "it does not name a picture", do)
        found[name] = [*found.get(name, []), file] if name == "reference_images" else file
    return found

"""The commands that show and compute nothing: ``ditkit plan``, ``stages``, ``plugs``, ``config explain``, ``runs``."""

from __future__ import annotations

import json
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit import pictures
from ditkit.cli import show
from ditkit.cli.flags import ModelName, PathArgument, Plugs, Prompt, RawSettings, bring_plugs, with_settings
from ditkit.cli.opening import model_name, open_pipe, settle
from ditkit.config import FIELDS, Settled, check_key
from ditkit.errors import SetupError, nearest
from ditkit.setup import COMPONENTS

if TYPE_CHECKING:
    from rich.text import Text

    from ditkit.execution.stage_list import StageList
    from ditkit.pipeline import Opened, Pipeline
    from ditkit.runs import Listed


PROMPT = 60  # letters of a prompt in the table of runs


@with_settings
def plan(given: RawSettings, prompt: Prompt = None) -> None:
    """Show the resolved request, setup, stages and steps of a run; nothing is computed."""
    pipe, request, settled = open_pipe(given)
    pipe.check(request)
    remarks: dict[str, str] = {}
    seen = pictures.read(request, {}, remarks)
    fitted = pipe.model.fit(request, seen)
    by_image = {key: f"image {request.image}" for key in ("width", "height") if request.size_from == "image" and seen}
    request = fitted.model_copy(update={"size_from": request.size_from})
    out, known = show.console(), [name for name in COMPONENTS if name in pipe.model.known]
    for title, settings in (("Request", request), ("Setup", pipe.setup)):
        rows = [
            (key, show.value(getattr(settings, key)), by_image.get(key) or settled.explain(key)[-1][0])
            for key in type(settings).model_fields
        ]
        out.print(show.section(title, show.table(("setting", "value", "from"), rows)))
    if remarks:
        out.print(show.section("Pictures", show.table(("picture", "how it is taken"), list(remarks.items()))))
    devices = [(name, *device_of(pipe, name)) for name in known]
    out.print(show.section("Components", show.table(("component", "device", "dtype"), devices)))
    where = pipe.places.of_run(pipe.stages, pipe.components, pipe.seams, lambda: pipe.steps(request))
    places: list[tuple[str, str, str]] = []
    for name in pipe.stages.names:
        segments = where.get(name) or ()
        places += [(name, str(s.from_step) if len(segments) > 1 else "", s.place.name) for s in segments]
        places += [] if segments else [(name, "", "here")]
    out.print(show.section("Places", show.table(("stage", "from step", "place"), places)))
    out.print(show.section("Stages", stage_table(pipe.stages)))
    out.print(show.section("Steps", show.step_table(pipe.steps(request), whole=True)))


def device_of(pipe: Pipeline, name: str) -> tuple[str, str]:
    """Device and dtype of a component; of one that lies at a host, what the host says."""
    part = pipe.model.known[name]
    if part.place is None:
        return pipe.setup.device_of(name), pipe.setup.dtype_of(name)
    return f"{part.told.get('device')} at {part.place}", str(part.told.get("dtype"))


def stages(model: ModelName = "shapes", plugs: Plugs = None) -> None:
    """List the stages of a pipeline: what each reads and writes, and the components that it calls."""
    import ditkit

    show.console().print(stage_table(ditkit.load(model_name(model), plugs=bring_plugs(plugs)).stages))


def stage_table(pipeline: StageList) -> Text:
    """A field in brackets is read if it is there, or written sometimes."""
    from rich.text import Text

    lines = []
    for stage in pipeline.stages:
        lines.append(Text(stage.name, "bold"))
        for what, always, sometimes in (
            ("calls", stage.components, ()),
            ("when", stage.triggers, ()),
            ("reads", stage.reads, stage.optional),
            ("writes", stage.writes, stage.may_write),
        ):
            names = [*always, *(f"[{name}]" for name in sometimes)]
            lines += [Text(f"  {what:7}{' '.join(names)}")] if names else []
    return Text("\n").join(lines)


def plugs(plugs: Plugs = None) -> None:
    """List what can be named in settings: ditkit's own, what installed packages bring, and what --plug names."""
    from ditkit.nn.attention import ATTENTION
    from ditkit.registry import Registry

    bring_plugs(plugs)
    registries = [*(registry for registry in Registry.every if registry is not ATTENTION), ATTENTION]
    rows = [(of.noun, name, of.origin(name), of[name].help) for of in registries for name in of]
    show.console().print(show.table(("what", "name", "from", ""), rows))


@with_settings
def explain(
    given: RawSettings,
    key: Annotated[str | None, typer.Argument(
        help="A setting, such as steps, or one of a stage, such as sharpness.amount. Default: all.", show_default=False,
    )] = None,
) -> None:  # fmt: skip
    """Show every layer that gives a value to a setting; the last one counts."""
    if key is not None and "." not in key:
        check_key(key, f"config explain {key}")
    settled, opened = settle(given)
    rows: list[tuple[str, str, str]] = []
    if key is None:
        for name in FIELDS:
            origin, value = settled.explain(name)[-1]
            rows.append((name, show.value(value), origin))
    elif "." in key:
        rows = of_stage(key, settled, opened)
    else:
        rows = [(key, show.value(value), origin) for origin, value in settled.explain(key)]
    show.console().print(show.table(("setting", "value", "from"), rows))


def of_stage(key: str, settled: Settled, opened: Opened) -> list[tuple[str, str, str]]:
    """The layers of STAGE.SETTING, of a stage that has settings of its own. Raises SetupError."""
    from ditkit.assembly import pipeline_of
    from ditkit.execution.stage import settings_of
    from ditkit.options import fields_of

    name, _, setting = key.partition(".")
    own = {stage.name: fields_of(settings_of(stage)) for stage in pipeline_of(opened.model, opened.setup).stages}
    known = [f"{stage}.{field}" for stage, fields in own.items() for field in fields]
    if key not in known:
        do = f"The known ones are {', '.join(known)}" if known else "Name a setting, or bring the stage with --plug"
        raise SetupError(f"config explain {key}", f"no stage has that setting{nearest(key, known)}", do)
    default = own[name][setting].default
    rows = [(key, "none" if default is MISSING else show.value(default), f"default (stage {name})")]
    for origin, tables in settled.given.get("stage_settings", ()):
        if setting in tables.get(name, {}) and show.value(tables[name][setting]) != rows[-1][1]:
            rows.append((key, show.value(tables[name][setting]), origin))
    return rows


def runs(
    folder: Annotated[Path, PathArgument(metavar="FOLDER", help="Where the runs lie.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the runs of a folder: name, progress, time, model, prompt; forks under what they were forked from."""
    from ditkit.runs import listed

    found = listed(folder)
    if as_json:
        print(json.dumps([_as_json(each) for each in found]))
        return
    console = show.console()
    columns = ("name", "progress", "begun", "model", "prompt")
    console.print(show.table(columns, map(_row, found)) if found else f"no runs in {folder}")
    for each in found:
        if each.fault:
            console.print(f"note: {each.fault}")


def _row(each: Listed) -> tuple[str, ...]:
    name = "  " * (each.depth - 1) + "└ " * bool(each.depth) + each.path.name
    if each.run is None:
        return name, each.progress, "", "", ""
    description = each.run.description
    prompt, above = description.request["prompt"], description.parent
    what = prompt if isinstance(prompt, str) else " | ".join(prompt)
    if above is not None:
        changes = ", ".join(f"{k}={show.value(new)}" for k, (_, new) in above.changed.items())
        what = f"{'' if above.step is None else f'@{above.step} '}{changes or 'nothing changed'}"
    begun, model = description.created[:16].replace("T", " "), Path(description.model["name"]).name
    return name, each.progress, begun, model, what if len(what) <= PROMPT else what[: PROMPT - 3] + "..."


def _as_json(each: Listed) -> dict[str, Any]:
    about = {"fault": each.fault} if each.run is None else each.run.description.model_dump(mode="json")
    return {"path": str(each.path), "progress": each.progress, "depth": each.depth, **about}

"""``ditkit plan PROMPT``: what a run would do, without loading any weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from ditkit import pictures
from ditkit.cli import show, stages
from ditkit.cli.flags import Prompt, RawSettings, with_settings
from ditkit.cli.opening import open_pipe
from ditkit.config import FIELDS
from ditkit.request import Settings
from ditkit.setup import COMPONENTS

if TYPE_CHECKING:
    from ditkit.config import Settled
    from ditkit.execution.place import Segment
    from ditkit.pipeline import Pipeline


def add_to(app: typer.Typer) -> None:
    app.command("plan")(plan)


@with_settings
def plan(given: RawSettings, prompt: Prompt = None) -> None:
    """Show the resolved request, setup, stages and steps of a run; nothing is computed."""
    pipe, request, settled = open_pipe(given)
    pipe.check(request)
    seen = pictures.read(request, {})
    fitted = pipe.model.fit(request, seen)
    by_image = {key: f"image {request.image}" for key in ("width", "height") if request.size_from == "image" and seen}
    request = fitted.model_copy(update={"size_from": request.size_from})
    out = show.console()
    for title, settings in (("Request", request), ("Setup", pipe.setup)):
        out.print(show.heading(title))
        out.print(show.table(("setting", "value", "from"), rows(settings, settled, by_image)))
    out.print(show.heading("Components"))
    known = pipe.model.known
    devices = [(name, *device_of(pipe, name)) for name in COMPONENTS if name in known]
    out.print(show.table(("component", "device", "dtype"), devices))
    out.print(show.heading("Places"))
    where = pipe.places.of_run(pipe.stages, pipe.components, pipe.seams, lambda: pipe.steps(request))
    places = [(name, *row) for name in pipe.stages.names for row in places_of(where.get(name))]
    out.print(show.table(("stage", "from step", "place"), places))
    out.print(show.heading("Stages"))
    out.print(stages.stage_table(pipe.stages))
    out.print(show.heading("Steps"))
    out.print(show.step_table(pipe.steps(request), whole=True))


def device_of(pipe: Pipeline, name: str) -> tuple[str, str]:
    """Device and dtype of a component; of one that lies at a host, what the host says."""
    part = pipe.model.known[name]
    if part.place is None:
        return pipe.setup.device_of(name), pipe.setup.dtype_of(name)
    return f"{part.told.get('device')} at {part.place}", str(part.told.get("dtype"))


def places_of(segments: Sequence[Segment] | None) -> list[tuple[str, str]]:
    """From which step on, and where; of a stage that simply runs here one row."""
    if not segments:
        return [("", "here")]
    return [("" if len(segments) == 1 else str(one.from_step), one.place.name) for one in segments]


def rows(settings: Settings, settled: Settled, origins: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Each setting with its value and where that comes from: ``origins``, else the layer that said it."""
    return [
        (key, show.value(getattr(settings, key)), origins.get(key) or settled.explain(key)[-1][0])
        for key in type(settings).model_fields
        if key in FIELDS
    ]

"""``ditkit stages``: the stages of a model's pipeline, and what each reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ditkit.cli import show
from ditkit.cli.flags import Plugs, bring_plugs
from ditkit.cli.opening import model_name

if TYPE_CHECKING:
    from rich.text import Text

    from ditkit.execution.stage_list import StageList


def add_to(app: typer.Typer) -> None:
    app.command("stages")(stages)


def stages(
    model: Annotated[str, typer.Option(help="A model's name or folder.")] = "shapes", plugs: Plugs = None
) -> None:
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

"""``ditkit stages``: the stages of a model's pipeline, and what each reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ditkit.cli import show

if TYPE_CHECKING:
    from rich.text import Text

    from ditkit.pipeline import Pipeline


def add_to(app: typer.Typer) -> None:
    app.command("stages")(stages)


def stages(model: Annotated[str, typer.Option(help="A model's name or folder.")] = "shapes") -> None:
    """List the stages of a pipeline: what each reads and writes, and the components that it calls."""
    import ditkit

    show.console().print(stage_table(ditkit.load(model).pipeline))


def stage_table(pipeline: Pipeline) -> Text:
    """A field in brackets is read if it is there, or written sometimes."""

    def names(always: tuple[str, ...], sometimes: tuple[str, ...]) -> str:
        return " ".join([*always, *(f"[{name}]" for name in sometimes)]) or "-"

    rows = [
        (s.name, names(s.components, ()), names(s.reads, s.optional), names(s.writes, s.may_write))
        for s in pipeline.stages
    ]
    return show.table(("stage", "components", "reads", "writes"), rows)

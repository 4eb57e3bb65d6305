"""``ditkit config explain KEY``: which layer a value comes from."""

from __future__ import annotations

from dataclasses import MISSING
from typing import TYPE_CHECKING, Annotated

import typer

from ditkit.cli import show
from ditkit.cli.flags import RawSettings, with_settings
from ditkit.cli.opening import settle
from ditkit.config import FIELDS, Settled, check_key
from ditkit.errors import SetupError, nearest

if TYPE_CHECKING:
    from ditkit.pipeline import Opened

Key = Annotated[
    str | None,
    typer.Argument(
        help="A setting, such as steps, or one of a stage, such as sharpness.amount. Default: all.", show_default=False
    ),
]

app = typer.Typer(name="config", help="Settings and where their values come from.", no_args_is_help=True)


@app.callback()
def group() -> None:
    pass


@app.command("explain")
@with_settings
def explain(
    given: RawSettings,
    key: Key = None,
) -> None:
    """Show every layer that gives a value to a setting; the last one counts."""
    own = key is not None and "." in key
    if key is not None and not own:
        check_key(key, f"config explain {key}")
    settled, opened = settle(given)
    if own and key is not None:
        show.console().print(show.table(("setting", "value", "from"), of_stage(key, settled, opened)))
        return
    rows: list[tuple[str, str, str]] = []
    for name in FIELDS if key is None else [key]:
        said = settled.explain(name)
        said = said[-1:] if key is None else said
        rows += [(name, show.value(value), origin) for origin, value in said]
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
    told = [(f"default (stage {name})", "none" if default is MISSING else show.value(default))]
    for origin, tables in settled.said.get("stage_settings", ()):
        if setting in tables.get(name, {}) and show.value(tables[name][setting]) != told[-1][1]:
            told.append((origin, show.value(tables[name][setting])))
    return [(key, value, origin) for origin, value in told]

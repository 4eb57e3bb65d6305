"""``ditkit config explain KEY``: which layer a value comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from ditkit.cli import show
from ditkit.cli.flags import RawSettings, with_settings
from ditkit.cli.opening import settle
from ditkit.config import FIELDS, check_key

Key = Annotated[str | None, typer.Argument(help="A setting, such as steps. Default: all.", show_default=False)]

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
    if key is not None:
        check_key(key, f"config explain {key}")
    settled, _ = settle(given)
    rows = []
    for name in FIELDS if key is None else [key]:
        said = settled.explain(name)
        said = said[-1:] if key is None else said
        rows += [(name, show.value(value), origin) for origin, value in said]
    show.console().print(show.table(("setting", "value", "from"), rows))

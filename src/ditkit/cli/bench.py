"""``ditkit bench``: measurements. What is measured lives elsewhere and is imported when it is asked for."""

from __future__ import annotations

import importlib

import typer

from ditkit.errors import MissingDependency

app = typer.Typer(name="bench", help="Measure quality.", no_args_is_help=True)


@app.callback()
def group() -> None:
    pass


@app.command(
    "quality", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def quality(context: typer.Context) -> int:
    """Generate clips of known prompts and measure colour, shape and direction from their pixels."""
    return hand_over("ditkit.lab.quality", "ditkit bench quality", context.args)


def hand_over(module: str, command: str, arguments: list[str]) -> int:
    """Call ``main(arguments)`` of a module, which returns an exit code or None."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != module:
            raise
        raise MissingDependency(
            f"`{command}`", f"this installation has no {module}", "Install a newer ditkit"
        ) from None
    if not hasattr(found, "main"):
        raise MissingDependency(f"`{command}`", f"{module} has no main", "Install a newer ditkit")
    return int(found.main(arguments) or 0)

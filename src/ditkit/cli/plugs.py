"""``ditkit plugs``: every row that is known here: plugs, stages, tasks, schedulers, kernels, kinds of networks."""

from __future__ import annotations

import typer

from ditkit.cli import show
from ditkit.cli.flags import Plugs, bring_plugs


def add_to(app: typer.Typer) -> None:
    app.command("plugs")(plugs)


def plugs(plugs: Plugs = None) -> None:
    """List what can be named in settings: ditkit's own, what installed packages bring, and what --plug names."""
    from ditkit.nn.attention import ATTENTION
    from ditkit.registry import Registry

    bring_plugs(plugs)
    registries = [*(registry for registry in Registry.every if registry is not ATTENTION), ATTENTION]
    rows = [(of.noun, name, of.origin(name), of[name].help) for of in registries for name in of]
    show.console().print(show.table(("what", "name", "from", ""), rows))

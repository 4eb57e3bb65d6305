"""``ditkit cache``: look at the results of stages that are kept on disk, and throw some or all of them away.

Which folder is meant follows from the settings ``cache`` and ``cache_gigabytes`` as in a run; without one it is that
of the user.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditkit import config
from ditkit.cli import show
from ditkit.cli.flags import RawSettings, to_path
from ditkit.errors import SetupError
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.store.cache import Cache

Folder = Annotated[str | None, typer.Option("--cache", metavar="FOLDER", help="The cache. Default: that of the user.")]
Limit = Annotated[str | None, typer.Option("--cache-gigabytes", metavar="N", help="Its limit, in 10^9 bytes.")]
File = Annotated[Path | None, typer.Option("--config", metavar="FILE", parser=to_path, help="A TOML file of settings.")]

app = typer.Typer(name="cache", help="Results of stages that are kept on disk.", no_args_is_help=True)


@app.callback()
def group() -> None:
    pass


@app.command("show")
def show_(cache: Folder = None, cache_gigabytes: Limit = None, file: File = None) -> None:
    """Show the folder, the limit, and what is kept of each stage."""
    setup = settled(cache, cache_gigabytes, file)
    out, kept = show.console(), opened(setup)
    stages = {} if kept is None else kept.contents()
    out.print(f"folder {folder(setup)}{'' if kept else ' (not there yet)'}")
    out.print(f"limit  {setup.cache_gigabytes:g} GB")
    out.print(f"kept   {sum(count for count, _ in stages.values())} results, {size(total(stages))}")
    if stages:
        rows = [(stage, str(count), size(bytes_)) for stage, (count, bytes_) in stages.items()]
        out.print(show.table(("stage", "results", "size"), rows))


@app.command("trim")
def trim(cache: Folder = None, cache_gigabytes: Limit = None, file: File = None) -> None:
    """Throw away what was not used for the longest time, down to the limit."""
    kept = opened(settled(cache, cache_gigabytes, file))
    freed, left = (0, 0) if kept is None else (kept.trim(), total(kept.contents()))
    show.console().print(f"freed {size(freed)}; {size(left)} are left")


@app.command("clear")
def clear(
    cache: Folder = None,
    file: File = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Throw everything away."""
    setup = settled(cache, None, file)
    kept = opened(setup)
    held = 0 if kept is None else total(kept.contents())
    if not yes and not sys.stdin.isatty():
        raise SetupError(f"clearing the cache {folder(setup)}", "nobody is there to be asked", "Add --yes")
    if yes or typer.confirm(f"Throw away {size(held)} in {folder(setup)}?"):
        show.console().print(f"freed {size(0 if kept is None else kept.clear())}")


def settled(cache: str | None, gigabytes: str | None, file: Path | None) -> Setup:
    """The settings of all layers but the model's. Raises SetupError."""
    typed = {"cache": cache, "cache_gigabytes": gigabytes}
    given = RawSettings({key: (text,) for key, text in typed.items() if text is not None}, (), file)
    setup = config.settle(*given.layers()).setup()
    return setup if setup.cache is not None else setup.model_copy(update={"cache": "default"})


def folder(setup: Setup) -> Path:
    from ditkit.store.cache import folder_of

    return folder_of(setup.cache or "default")


def opened(setup: Setup) -> Cache | None:
    """None if it is not there; it is not made for being looked at. Raises SetupError."""
    from ditkit.store.cache import LAYOUT, open_cache

    return open_cache(setup) if (folder(setup) / LAYOUT).exists() else None


def total(stages: Mapping[str, tuple[int, int]]) -> int:
    return sum(size for _, size in stages.values())


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

"""``ditkit cache``: look at the results of stages that are kept on disk, and throw some or all of them away. The folder
is that of a run with the same settings; without any it is that of the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditkit import config
from ditkit.cli import show
from ditkit.cli.flags import ConfigFile, RawSettings
from ditkit.errors import SetupError

if TYPE_CHECKING:
    from ditkit.store.cache import Cache

Folder = Annotated[str | None, typer.Option("--cache", metavar="FOLDER", help="The cache. Default: that of the user.")]
Limit = Annotated[str | None, typer.Option("--cache-gigabytes", metavar="N", help="Its limit, in 10^9 bytes.")]


def show_(cache: Folder = None, cache_gigabytes: Limit = None, file: ConfigFile = None) -> None:
    """Show the folder, the limit, and what is kept of each stage."""
    folder, limit, kept = opened(cache, cache_gigabytes, file)
    stages, out = {} if kept is None else kept.contents(), show.console()
    out.print(f"folder {folder}{'' if kept else ' (not there yet)'}")
    out.print(f"limit  {limit:g} GB")
    out.print(f"kept   {sum(count for count, _ in stages.values())} results, {size(total(stages))}")
    if stages:
        rows = [(stage, str(count), size(bytes_)) for stage, (count, bytes_) in stages.items()]
        out.print(show.table(("stage", "results", "size"), rows))


def trim(cache: Folder = None, cache_gigabytes: Limit = None, file: ConfigFile = None) -> None:
    """Throw away what was not used for the longest time, down to the limit."""
    _, _, kept = opened(cache, cache_gigabytes, file)
    freed, left = (0, 0) if kept is None else (kept.trim(), total(kept.contents()))
    show.console().print(f"freed {size(freed)}; {size(left)} are left")


def clear(
    cache: Folder = None,
    file: ConfigFile = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Throw everything away."""
    folder, _, kept = opened(cache, None, file)
    held = 0 if kept is None else total(kept.contents())
    if not yes and not sys.stdin.isatty():
        raise SetupError(f"clearing the cache {folder}", "nobody is there to be asked", "Add --yes")
    if yes or typer.confirm(f"Throw away {size(held)} in {folder}?"):
        show.console().print(f"freed {size(0 if kept is None else kept.clear())}")


def opened(cache: str | None, gigabytes: str | None, file: Path | None) -> tuple[Path, float, Cache | None]:
    """The folder, the limit in 10^9 bytes, and the cache in it; None if it is not there: it is not made for being
    looked at. All layers of settings count but the model's. Raises SetupError."""
    from ditkit.store.cache import LAYOUT, Cache, folder_of

    typed = {"cache": cache, "cache_gigabytes": gigabytes}
    given = RawSettings({key: [text] for key, text in typed.items() if text is not None}, file=file)
    setup = config.settle(*given.layers()).setup()
    folder, limit = folder_of(setup.cache or "default"), setup.cache_gigabytes
    return folder, limit, Cache(folder, int(limit * 1e9)) if os.path.exists(folder / LAYOUT) else None


def total(stages: Mapping[str, tuple[int, int]]) -> int:
    return sum(size for _, size in stages.values())


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

"""``ditkit convert SRC DST --layout native|diffusers``: the same model in the other layout, type or shards."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditkit.cli import show
from ditkit.cli.flags import Plugs, bring_plugs, to_path
from ditkit.cli.located import located, packaged
from ditkit.errors import SetupError

if TYPE_CHECKING:
    from ditkit.checkpoints.convert.convert import Progress

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_to(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    src: Annotated[
        Path,
        typer.Argument(
            parser=to_path, help="A model's folder or manifest, one component or file of it, or a packaged model."
        ),
    ],
    dst: Annotated[Path, typer.Argument(parser=to_path, help="The folder to write.")],
    layout: Annotated[str, typer.Option(help="native (the official code's) or diffusers.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 for every tensor. Default: as stored.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Which weights of a diffusers folder, such as fp16.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of tensors in one safetensors file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in DST.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path.")] = False,
    plugs: Plugs = None,
) -> int:
    """Write a model, whole or not at all, in another layout or type; tensor by tensor, so memory stays small."""
    from ditkit.checkpoints.convert.convert import convert as run

    bring_plugs(plugs)
    src = packaged(src)
    with _progress(quiet) as progress:
        done = run(
            src, dst, layout, dtype,
            located=located(src, variant, verify=True), shard_bytes=to_bytes(max_shard_size), overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    if quiet:
        print(done.path)
        return 0
    out = show.console()
    out.print(show.table(("file", "size"), [(name, f"{size / 1e6:.1f} MB") for name, size in done.files.items()]))
    out.print(show.table(("component", "type"), list(done.types.items())))
    for remark in done.remarks:
        out.print(f"note: {remark}")
    out.print(f"wrote {done.path}")
    return 0


def to_bytes(text: str) -> int:
    """``5GB`` or ``500MB`` or a number of bytes. Raises SetupError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip().upper())
    if not match:
        raise SetupError("--max-shard-size", f"{text!r} is no size", "Write a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2] or ""])


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal's stderr; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=show.console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)

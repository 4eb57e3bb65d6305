"""The commands that write for a model: ``ditkit convert SRC DST`` (the same model in the other layout, type or shards)
and ``ditkit lock MANIFEST`` (pin every component to a commit and to the bytes of its files)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditkit.cli import show
from ditkit.cli.flags import PathArgument, Plugs, bring_plugs
from ditkit.cli.opening import packaged
from ditkit.errors import LoadError, SetupError

if TYPE_CHECKING:
    from ditkit.checkpoints.convert.convert import Progress

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    src: Annotated[
        Path, PathArgument(help="A model's folder or manifest, one component or file of it, or a packaged model.")
    ],
    dst: Annotated[Path, PathArgument(help="The folder to write.")],
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
    from ditkit.checkpoints.model.find import parts_of

    bring_plugs(plugs)
    src = packaged(src)
    with _progress(quiet) as progress:
        located, shard_bytes = parts_of(src, variant, verify=True), to_bytes(max_shard_size)
        done = run(src, dst, layout, dtype, located=located, shard_bytes=shard_bytes, overwrite=overwrite,
                   progress=progress)  # fmt: skip
    out = show.console()
    if not quiet:
        out.print(show.table(("file", "size"), [(name, megabytes(size)) for name, size in done.files.items()]))
        out.print(show.table(("component", "type"), list(done.types.items())))
        for remark in done.remarks:
            out.print(f"note: {remark}")
    out.print(f"{'' if quiet else 'wrote '}{done.path}")
    return 0


def to_bytes(text: str) -> int:
    """``5GB`` or ``500MB`` or a number of bytes. Raises SetupError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip().upper())
    if not match:
        raise SetupError("--max-shard-size", f"{text!r} is no size", "Write a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


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


def lock(
    manifest: Annotated[Path, typer.Argument(help="A manifest (ditkit.toml, model_index.json) or its folder.")],
    check: Annotated[bool, typer.Option("--check", help="Only compare; exit with 2 if a byte is different.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use what was fetched before; no network.")] = False,
) -> int:
    """Write ditkit.lock beside a manifest: the commit of each repository, the size and sha256 of each file."""
    from ditkit.checkpoints.model import lock as locks
    from ditkit.checkpoints.model.hub import Hub
    from ditkit.checkpoints.model.manifest import Manifest
    from ditkit.media.files import write_together

    out, hub, opened = show.console(), Hub(offline=offline), Manifest.open(manifest, lock=check)
    if check:
        if not opened.locked:
            raise LoadError(f"checking {manifest}", "it has no lock", "Write one with `ditkit lock`")
        size = sum(locks.verify(place, place.resolve(hub)) for place in opened.components.values())
        out.print(f"{len(opened.components)} components, {megabytes(size)}: every byte is what it was")
        return 0
    file = locks.lock_file(opened)
    before, after = locks.read_lock(file), locks.make_lock(opened, hub)
    rows = []
    for name, entry in after.items():
        size = sum(size for size, _ in entry.files.values())
        rows.append((name, entry.written, (entry.revision or "")[:12], str(len(entry.files)), megabytes(size)))
    out.print(show.table(("component", "place", "commit", "files", "size"), rows))
    for place in opened.components.values():
        if Path(place.written).is_absolute():
            out.print(f"note: {place.component} has an absolute path, so the manifest works on this machine only")
    differences = locks.changes(before, after)
    if before and differences:
        out.print(show.table(("component", "since the last lock"), differences))
    write_together({file: locks.lock_text(after).encode()})
    out.print(f"wrote {file}" if differences else f"{file} is as it was")
    return 0

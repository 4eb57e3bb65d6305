"""``ditkit lock MANIFEST``: pin every component of a model to a commit and to the bytes of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli import show


def add_to(app: typer.Typer) -> None:
    app.command("lock")(lock)


def lock(
    manifest: Annotated[Path, typer.Argument(help="A manifest (ditkit.toml, model_index.json) or its folder.")],
    check: Annotated[bool, typer.Option("--check", help="Only compare; exit with 2 if a byte is different.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use what was fetched before; no network.")] = False,
) -> int:
    """Write ditkit.lock beside a manifest: the commit of each repository, the size and sha256 of each file."""
    from ditkit.checkpoints.model import lock as locks
    from ditkit.checkpoints.model.hub import Hub
    from ditkit.checkpoints.model.manifest import Manifest
    from ditkit.errors import LoadError
    from ditkit.media.files import write_together

    out, hub = show.console(), Hub(offline=offline)
    if check:
        opened = Manifest.open(manifest)
        if not opened.locked:
            raise LoadError(f"checking {manifest}", "it has no lock", "Write one with `ditkit lock`")
        size = sum(locks.verify(place, place.resolve(hub)) for place in opened.components.values())
        out.print(f"{len(opened.components)} components, {size / 1e6:.1f} MB: every byte is what it was")
        return 0
    opened = Manifest.open(manifest, lock=False)
    file = locks.lock_file(opened)
    before, after = locks.read_lock(file), locks.make_lock(opened, hub)
    rows = [
        (name, entry.written, (entry.revision or "")[:12], str(len(entry.files)), f"{_size(entry) / 1e6:.1f} MB")
        for name, entry in after.items()
    ]
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


def _size(entry: object) -> int:
    return sum(size for size, _ in entry.files.values())  # type: ignore[attr-defined]

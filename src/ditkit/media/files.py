"""Clips and what lies beside them, written together: whole or not at all, and never two that do not belong to each
other. Leaves out: what is in them, and how one file or folder appears (``writing.py``)."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ditkit import writing
from ditkit.errors import OutputError

Content = bytes | Mapping[str, bytes] | None
"""A file, a folder of files, or nothing: what has that name is taken away."""

_PROBE = bytes(64 * 1024)


def write_together(contents: Mapping[Path, Content]) -> None:
    """Write everything, then name everything; existing targets are replaced. Parents are created. On the disk when this
    returns.

    What has the names of all targets but the first is moved away before the first gets its name, so that whoever kills
    this process in between finds the first one alone and never beside something of another clip.

    Raises OutputError with what the system said. Of these files nothing is left then."""
    (first, *others), folders = contents, {target.parent for target in contents}
    for folder in folders:
        writing.sweep(folder)
    with contextlib.ExitStack() as stack:
        parts = {}
        for target, content in contents.items():
            with _told(target):
                writing.make_folder(target.parent)
                if content is not None:
                    parts[target] = stack.enter_context(_written(target, content))
        with _told(first):
            stack.enter_context(writing.naming(first.parent))
        moved = {target: stack.enter_context(_moved_away(target)) for target in others}
        for target, part in parts.items():
            with _told(target):
                writing.take_place(part, target)
        for away in moved.values():
            writing.remove(away)
        for folder in folders:
            with _told(folder / first.name):
                writing.sync_folder(folder)


def probe(target: Path) -> None:
    """Raise now the OutputError that writing ``target`` would end with later. What killed processes left beside it is
    removed."""
    with _told(target):
        writing.make_folder(target.parent)
        writing.sweep(target.parent)
        with writing.new_file(target) as (_, file):
            file.write(_PROBE)
            file.flush()
        with contextlib.suppress(FileNotFoundError):
            target.lstat()  # a name too long for the file system shows here


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """What the system says against writing ``target`` is an OutputError."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and Path(error.filename).parent != target.parent else ""
        found = (error.strerror or str(error) or type(error).__name__).lower() + where
        raise OutputError(f"writing {target}", found, "Choose a folder that can be written to and has room") from error


@contextlib.contextmanager
def _written(target: Path, content: bytes | Mapping[str, bytes]) -> Iterator[Path]:
    """Beside ``target``, on the disk, and removed at the end of the block if it has not got its name."""
    if isinstance(content, Mapping):
        with writing.new_folder(target) as folder:
            for name, data in content.items():
                (folder / name).write_bytes(data)
                writing.sync_file(folder / name)
            writing.sync_folder(folder)
            yield folder
        return
    with writing.new_file(target) as (part, file):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk only here
        yield part


@contextlib.contextmanager
def _moved_away(target: Path) -> Iterator[Path]:
    """What was there gets its name back at the end of the block, if it is still without an heir."""
    away = writing.part_of(target)
    try:
        with _told(target), contextlib.suppress(FileNotFoundError):
            os.rename(target, away)
        yield away
    finally:
        if os.path.lexists(away):
            with contextlib.suppress(OSError):
                if not os.path.lexists(target):
                    os.rename(away, target)
            writing.remove(away)

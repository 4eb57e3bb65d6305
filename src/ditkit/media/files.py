"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed. Leaves out:
what is in them."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from ditkit.errors import OutputError

Content = bytes | Mapping[str, bytes]
"""A file, or a folder of files."""

_PROBE = bytes(64 * 1024)


def write_together(contents: Mapping[Path, Content]) -> None:
    """Write everything, then rename everything; existing targets are replaced. Parents are created.

    Raises OutputError with what the system said. Of these files nothing is left then."""
    parts = {target: _temporary(target) for target in contents}
    try:
        for target, content in contents.items():
            with _told(target):
                _write(parts[target], content)
        for target, part in parts.items():
            with _told(target):
                _replace(part, target)
    finally:
        for part in parts.values():
            _remove(part)


def probe(target: Path) -> None:
    """Raise now the OutputError that writing ``target`` would end with later."""
    part = _temporary(target)
    try:
        with _told(target):
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(_PROBE)
            with contextlib.suppress(FileNotFoundError):
                target.lstat()  # a name too long for the file system shows here
    finally:
        _remove(part)


def _temporary(target: Path) -> Path:
    return target.with_name(f".ditkit-{secrets.token_hex(6)}.part")


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """What the system says against writing ``target`` is an OutputError."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and Path(error.filename).parent != target.parent else ""
        found = (error.strerror or str(error) or type(error).__name__).lower() + where
        raise OutputError(f"writing {target}", found, "Choose a folder that can be written to and has room") from error


def _write(part: Path, content: Content) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Mapping):
        part.mkdir()
        for name, data in content.items():
            (part / name).write_bytes(data)
        return
    with part.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk only here


def _replace(part: Path, target: Path) -> None:
    if not (part.is_dir() and target.is_dir()):
        os.replace(part, target)
        return
    old = _temporary(target)  # a folder cannot replace a full one in one move
    os.rename(target, old)
    try:
        os.rename(part, target)
    except OSError:
        os.rename(old, target)
        raise
    old.unlink() if old.is_symlink() else shutil.rmtree(old)


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # it was renamed, or never made
        shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()

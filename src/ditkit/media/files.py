"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed.

Leaves out: what is in them.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from ditkit.errors import OutputError

Content = bytes | Mapping[str, bytes]
"""A file, or a folder of files."""

_PROBE = bytes(64 * 1024)


def write_together(contents: Mapping[Path, Content]) -> None:
    """Write everything, then rename everything; existing targets are replaced. Parents are created.

    Raises:
        OutputError: with what the system said. Of these files nothing is left then.
    """
    ready: list[tuple[Path, Path]] = []
    target = next(iter(contents))
    try:
        for target, content in contents.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = _temporary(target)
            ready.append((part, target))
            _write(part, content)
        for part, target in ready:
            _replace(part, target)
    except OSError as error:
        raise _failure(target, error) from error
    finally:
        for part, _ in ready:
            _remove(part)


def probe(target: Path) -> None:
    """Raise now the OutputError that writing ``target`` would end with later."""
    part = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(_PROBE)
        with contextlib.suppress(FileNotFoundError):
            target.lstat()  # a name too long for the file system shows here
    except OSError as error:
        raise _failure(target, error) from error
    finally:
        _remove(part)


def _temporary(target: Path) -> Path:
    return target.with_name(f".ditkit-{secrets.token_hex(6)}.part")


def _write(part: Path, content: Content) -> None:
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
    shutil.rmtree(old)


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # it was renamed, or never made
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def _failure(target: Path, error: OSError) -> OutputError:
    where = f" ({error.filename})" if error.filename and Path(error.filename).parent != target.parent else ""
    found = (error.strerror or str(error) or type(error).__name__).lower() + where
    return OutputError(f"writing {target}", found, "choose a folder that can be written to and has room")

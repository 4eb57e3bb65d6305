"""Names of files that are to be written: whether a system can give them, and the next one that is free. Leaves out:
whether the folder can be written to, which only writing a block there tells (``media/files.py``)."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

from ditkit.errors import DitkitError, OutputError

LONGEST = 255  # bytes of a name on every file system in use


def fault_of_path(path: str | os.PathLike[str]) -> str:
    """Why no file can have such a path, or nothing."""
    text = os.fspath(path)
    try:
        names = os.fsencode(text).split(os.fsencode(os.sep))
    except UnicodeEncodeError as e:
        return f"this system cannot write {text[e.start]!a}, one of its letters"
    if b"\0" in os.fsencode(text):
        return "no name has a NUL in it"
    if long := [name for name in names if len(name) > LONGEST]:
        return f"a name in it has {len(long[0])} bytes, and {LONGEST} are the most"
    return ""


def check_file_name(
    path: str | os.PathLike[str], asked: str, error: type[DitkitError] = OutputError, folder: bool = False
) -> None:
    """Raise ``error`` unless ``path`` can name a file to write, or a ``folder``. A text is looked at as it was written:
    one that ends in a slash names no file."""
    text, do = os.fspath(path), f"Give the name of a {'folder' if folder else 'file'}"
    whole = text.replace(os.sep, "/")
    name = (whole.rstrip("/") if folder else whole).rpartition("/")[2]
    if fault := fault_of_path(text) or ("" if text.strip() else "that is no name"):
        raise error(asked, fault, do)
    if name in ("", ".", ".."):
        raise error(asked, "that names no new folder" if folder else "that is a folder", do)


def shortened(text: str) -> str:
    """A path as an error shows it."""
    return text if len(text) <= LONGEST else f"{text[:60]}..."


def free(path: Path, taken: Callable[[Path], bool] = os.path.lexists) -> Path:
    """``path``, or the first of NAME_2, NAME_3, ... that is not ``taken``."""
    later = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2))
    return path if not taken(path) else next(name for name in later if not taken(name))


def beside(path: Path, ending: str) -> Path:
    """``path`` with another ending; of a long name the beginning, so that there is room for that and for a number."""
    stem = path.stem.encode(errors="surrogateescape")[: LONGEST - 40 - len(ending)].decode(errors="ignore")
    return path.with_name(f"{stem or 'clip'}{ending}")

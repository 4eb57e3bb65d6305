"""Names and notes as text: a few of many names in a message, JSON that a person or a program wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditkit import limits
from ditkit.errors import LoadError, shortened
from ditkit.reading import parse_json, read_bytes

AGAIN = "Download the file again, it is damaged or incomplete"
ABSENT = ("there is no such file", "Check the path, or download the model again")


def some(names: object, limit: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    listed = sorted(names)  # type: ignore[call-overload]
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(shortened(name, limits.NAME) for name in listed[:limit]) + rest


@contextmanager
def readable(asked: str) -> Iterator[None]:
    """What the disk refuses, such as a folder that may not be entered, raises LoadError."""
    try:
        yield
    except FileNotFoundError:
        raise LoadError(asked, *ABSENT) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        found = f"it cannot be read ({str(where)[:200]}{error.strerror})"
        raise LoadError(asked, found, "Check the path and its permissions") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``. Raises LoadError when it is missing, unreadable or not an object."""
    asked = f"reading {file}"
    try:
        return json_object(read_bytes(file, asked), asked)
    except FileNotFoundError:
        raise LoadError(asked, *ABSENT) from None


def json_object(raw: bytes | str, asked: str) -> dict[str, Any]:
    """Raises LoadError when it is none."""
    value = parse_json(raw, asked, do="Download the file again")
    if not isinstance(value, dict):
        raise LoadError(asked, f"it holds a {type(value).__name__}, not an object", "Download the file again")
    return value

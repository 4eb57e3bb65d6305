"""Names and notes as text: a few of many names in a message, JSON that a person or a program wrote."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditkit.errors import LoadError

AGAIN = "Download the file again, it is damaged or incomplete"


def some(names: object, limit: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    listed = sorted(names)  # type: ignore[call-overload]
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest


def printable(value: object) -> None:
    """Raises ValueError for halves of characters, which JSON can spell and no terminal can show."""
    json.dumps(value, ensure_ascii=False).encode()


@contextmanager
def readable(asked: str) -> Iterator[None]:
    """What the disk refuses, such as a folder that may not be entered, raises LoadError."""
    try:
        yield
    except FileNotFoundError:
        raise LoadError(asked, "there is no such file", "Check the path, or download the model again") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        found = f"it cannot be read ({str(where)[:200]}{error.strerror})"
        raise LoadError(asked, found, "Check the path and its permissions") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``. Raises LoadError when it is missing, unreadable or not an object."""
    with readable(f"reading {file}"):
        raw = file.read_bytes()
    return json_object(raw, f"reading {file}")


def json_object(raw: bytes, asked: str) -> dict[str, Any]:
    """Raises LoadError when it is none."""
    try:
        value = json.loads(raw.decode())
        printable(value)
    except ValueError as error:
        raise LoadError(asked, f"it is not valid JSON ({error})", "Download the file again") from None
    except RecursionError:
        raise LoadError(asked, "it is nested too deeply", "Download the file again") from None
    if not isinstance(value, dict):
        raise LoadError(asked, f"it holds a {type(value).__name__}, not an object", "Download the file again")
    return value

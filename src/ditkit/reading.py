"""Small files that decide something (configs, manifests, records, templates), read whole and within limits.

Only ordinary files are opened: a pipe would be waited for, and a device never ends. Every way in which a file can be
wrong ends in an error of the class that the caller gives. Leaves out: files of weights (``checkpoints/files``), media,
and what the values mean."""

import errno
import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any, BinaryIO

from ditkit import limits
from ditkit.errors import DitkitError, LoadError

CHECK = "Check the path and its permissions"
REPAIR = "Repair the file, or take a whole copy of it"


def open_ordinary(file: str | Path) -> BinaryIO:
    """``file``, open for reading, if it is an ordinary one. Raises OSError; for a pipe, a device or a folder, too."""
    try:
        number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as e:  # a zero byte or half of a character in its name
        raise OSError(errno.EINVAL, str(e), str(file)) from None
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(0, "it is no ordinary file", str(file))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(
    file: str | Path, asked: str, error: type[DitkitError] = LoadError, *, limit: int = limits.TEXT, do: str = CHECK
) -> bytes:
    """All bytes of an ordinary file of at most ``limit``. Raises ``error``; FileNotFoundError where there is none."""
    try:
        with open_ordinary(file) as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError:
        if os.path.islink(file):  # whatever decides numbers is absent for sure, or read
            raise error(asked, f"{file} is a link to what is not there ({os.readlink(file)})", do) from None
        raise
    except OSError as e:
        raise error(asked, f"{file} cannot be read ({(e.strerror or str(e)).lower()})", do) from None
    if len(data) > limit:
        raise error(asked, f"{file} has more than {limit:,} bytes", REPAIR)
    return data


def decoded(data: bytes, asked: str, error: type[DitkitError] = LoadError, *, do: str = REPAIR) -> str:
    """UTF-8 with or without a mark at its beginning, as text. Raises ``error``."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise error(asked, f"it is not UTF-8 (byte {data[e.start]:#04x} at {e.start})", do) from None


def parse_json(data: bytes | str, asked: str, error: type[DitkitError] = LoadError, *, do: str = REPAIR) -> Any:
    """The value of a JSON text: no deeper than DEPTH, no numbers beyond DIGITS, no halves of characters. Raises
    ``error``."""
    text = data if isinstance(data, str) else decoded(data, asked, error, do=do)
    try:
        value = json.loads(text)
        check_value(value)
    except (ValueError, RecursionError) as e:
        raise error(asked, f"it is not valid JSON ({_why(e)})", do) from None
    return value


def parse_toml(data: bytes | str, asked: str, error: type[DitkitError] = LoadError, *, do: str = REPAIR) -> Any:
    """The table of a TOML text, within the same limits. Raises ``error``."""
    text = data if isinstance(data, str) else decoded(data, asked, error, do=do)
    try:
        value = tomllib.loads(text)
        check_value(value)
    except (ValueError, RecursionError) as e:
        raise error(asked, f"it is not valid TOML ({_why(e)})", do) from None
    return value


def check_value(value: object) -> None:
    """Raise ValueError for a value that is nested too deeply, has a number that is too long or halves of characters,
    which JSON can spell and no terminal can show."""
    level: list[object] = [value]
    for _ in range(limits.DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list | tuple):
                below += item
            elif isinstance(item, str):
                item.encode()
            elif isinstance(item, int) and item.bit_length() > 3 * limits.DIGITS:
                raise ValueError(f"a number of more than {limits.DIGITS} digits")
        if not below:
            return
        level = below
    raise ValueError(f"more than {limits.DEPTH} tables or lists within each other")


def _why(e: Exception) -> str:
    if isinstance(e, RecursionError):
        return f"more than {limits.DEPTH} tables or lists within each other"
    if isinstance(e, UnicodeEncodeError):
        return "half of a character"
    return str(e)[: limits.MESSAGE]

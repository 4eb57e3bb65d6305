"""Small files that decide something (configs, manifests, records, templates), read whole and within limits.

Only ordinary files are opened: a pipe would be waited for, and a device never ends. Every way in which a file can be
wrong ends in an error of the class that the caller gives. Leaves out: files of weights (``checkpoints/files``), media,
and what the values mean."""

import errno
import json
import os
import re
import stat
import tomllib
from io import BufferedReader
from pathlib import Path
from typing import Any

from ditkit import limits
from ditkit.errors import DitkitError, LoadError, shortened

CHECK = "Check the path and its permissions"
REPAIR = "Repair the file, or take a whole copy of it"
WHOLE = "Wait until the download is done, or begin it again"

STRANGERS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"version https://git-lfs"), "it is a pointer of git-lfs, not the file itself",
     "Run `git lfs pull` in its folder, or download the file itself"),
    (re.compile(rb"\s*<(!doctype|html|head|body)", re.I), "it is a web page",
     "Log in or accept the terms where it comes from, and download it again"),
    (re.compile(rb"\s*<(\?xml|error)", re.I), "it is a text in XML, such as a server's error", "Download it again"),
    (re.compile(rb"\s*\{\s*\"(error|message|detail|errors|code|status)\"\s*:", re.I), "it is a server's error",
     "Log in or accept the terms where it comes from, and download it again"),
    (re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"), "it is a packed archive", "Unpack it"),
    (re.compile(rb"L\0\0\0\x01\x14\x02\0"), "it is a shortcut of Windows", "Give the file that it stands for"),
    (re.compile(rb"\0\x05\x16\x07"), "it is what macOS keeps beside a file on other disks", "Give the file itself"),
    (re.compile(rb"\0{64}"), "it begins with zeros, as an unfinished download does", "Download the file again"),
)  # fmt: skip
"""How a file begins that is something else than what its name says: what it is, and what to do."""
UNFINISHED = (".aria2", ".incomplete", ".part", ".partial", ".crdownload", ".download", ".opdownload", ".!ut", ".!qb")
"""Ends of names of downloads that are not done; an ``.aria2`` stands beside its file, which has its whole size."""
LITTER = re.compile(r"\..*|thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r|~\$.*|~lock\..*|~syncthing~.*|.*\.tmp|.*\.lnk|"
                    r"__macosx|\$recycle\.bin|system volume information|@eadir", re.I)  # fmt: skip
"""Names that systems and programs for synchronising leave in any folder; hidden files are among them."""


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name was left there by a system and is nobody's data."""
    return LITTER.fullmatch(name) is not None


def stranger(data: bytes) -> tuple[str, str] | None:
    """What a file that begins with ``data`` is instead of JSON, TOML or weights, and what to do about it; else None."""
    if not data:
        return "it is empty (0 bytes)", "Download the file again"
    return next(((what, do) for mark, what, do in STRANGERS if mark.match(data)), None)


def file_at(
    path: str | Path, asked: str | None = None, error: type[DitkitError] = LoadError, *, do: str = CHECK
) -> bool:
    """Whether an ordinary file is at ``path``. False only where there is nothing for sure: raises ``error`` for a link
    to nothing or to itself, for what may not be looked at, and for a folder, a pipe or a device of that name."""
    asked = f"looking for {path}" if asked is None else asked
    mode = _mode(path, asked, error, do)
    if mode is not None and not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise error(asked, f"{path} is {what}", do)
    return mode is not None


def folder_at(
    path: str | Path, asked: str | None = None, error: type[DitkitError] = LoadError, *, do: str = CHECK
) -> bool:
    """Whether a folder is at ``path``. False where there is nothing for sure, or a file. Raises ``error`` like
    ``file_at``."""
    mode = _mode(path, f"looking for {path}" if asked is None else asked, error, do)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: str | Path, asked: str, error: type[DitkitError], do: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if (link := _to_nothing(Path(path))) is not None:
            do = "Put there what it stands for, or remove the link"
            raise error(asked, f"{link} is a link to what is not there ({os.readlink(link)})", do) from None
        return None
    except (OSError, ValueError) as e:
        found = getattr(e, "strerror", None) or str(e)
        raise error(asked, f"{path} cannot be read ({found.lower()})", do) from None


def _to_nothing(path: Path) -> Path | None:
    """The link for which ``path`` is not there, if it is one."""
    last = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    return last if os.path.islink(last) and not os.path.exists(last) else None


def check_path(text: str, asked: str, error: type[DitkitError] = LoadError) -> None:
    """Raise ``error`` for a path with a control character: nobody means one, and TOML makes them of backslashes."""
    if (found := next((char for char in text if char < " " or char == "\x7f"), None)) is not None:
        shown = {"\t": r"a tab (\t)", "\n": r"a line break (\n)", "\b": r"a backspace (\b)", "\f": r"a form feed (\f)"}
        what = shown.get(found, f"the control character {ord(found):#04x}")
        do = "Write backslashes twice, or / instead, or the path in single quotes"
        raise error(asked, f"there is {what} in the path {text[:200]!r}", do)


def open_ordinary(file: str | Path) -> BufferedReader:
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
        _mode(file, asked, error, do)  # whatever decides numbers is absent for sure, or read
        raise
    except OSError as e:
        raise error(asked, f"{file} cannot be read ({(e.strerror or str(e)).lower()})", do) from None
    if len(data) > limit:
        raise error(asked, f"{file} has more than {limit:,} bytes", REPAIR)
    return data


def decoded(data: bytes, asked: str, error: type[DitkitError] = LoadError, *, do: str = REPAIR) -> str:
    """UTF-8 with or without a mark at its beginning, as text. Raises ``error``."""
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as e:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise error(asked, "it is UTF-16", "Save it as UTF-8") from None
        raise error(asked, f"it is not UTF-8 (byte {data[e.start]:#04x} at {e.start})", do) from None


def parse_json(data: bytes | str, asked: str, error: type[DitkitError] = LoadError, *, do: str = REPAIR) -> Any:
    """The value of a JSON text: no deeper than DEPTH, no numbers beyond DIGITS, no halves of characters. Raises
    ``error``."""
    text = data if isinstance(data, str) else decoded(_data(data, asked, error), asked, error, do=do)
    try:
        return value_of(text)
    except (ValueError, RecursionError) as e:
        raise error(asked, f"it is not valid JSON ({_why(e)})", do) from None


def value_of(text: str) -> Any:
    """The value of a JSON text within all limits. Raises ValueError, RecursionError."""
    if sum(map(text.count, ",[{")) > limits.VALUES:  # before they take memory; commas in its texts count, too
        raise ValueError(f"more than {limits.VALUES:,} values")
    value = json.loads(text)
    check_value(value)
    return value


def parse_toml(data: bytes | str, asked: str, error: type[DitkitError] = LoadError, *, do: str = REPAIR) -> Any:
    """The table of a TOML text, within the same limits. Raises ``error``."""
    text = data if isinstance(data, str) else decoded(data, asked, error, do=do)
    try:
        value = tomllib.loads(text)
        check_value(value)
    except (ValueError, RecursionError) as e:
        if re.search("hex value|[Uu]nescaped|scalar value", str(e)) and "\\" in text:
            do = "Write backslashes twice, or / instead, or the path in single quotes"
        raise error(asked, f"it is not valid TOML ({_why(e)})", do) from None
    return value


def _data(data: bytes, asked: str, error: type[DitkitError]) -> bytes:
    """``data``, which may be JSON. Raises ``error`` for what is something else at the first glance."""
    if (found := stranger(data)) is not None and not data.lstrip().startswith(b"{"):
        raise error(asked, *found)
    return data


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
    return shortened(str(e), limits.MESSAGE // 2)

"""Files and folders that appear whole or not at all, and outlive a loss of power.

Each is written beside its target, under a name that nobody can guess, and then takes the target's name. While a process
writes, it holds a lock on what it writes; the system lets go of that lock when the process ends, however that is. So
``sweep`` knows what killed processes left, whatever the clock says. Leaves out: what is written."""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ditkit.errors import OutputError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing is locked there, so nothing is swept
    fcntl = None  # type: ignore[assignment]

PATIENCE = 5.0  # seconds to wait for somebody else who gives names in the same folder; that takes milliseconds
PART = re.compile(r"\.ditkit-[0-9a-f]{12}\.part")
OLD = re.compile(r"\.(.+)\.ditkit-[0-9a-f]{12}-([0-9a-f]+)\.old", re.DOTALL)  # its name, the inode of its heir
OWN = "ditkit-own-"  # how the names of scratch folders begin
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF)


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], asked: str, durable: bool = True) -> None:
    """One file, complete or not at all; ``durable``: when this returns it outlives a loss of power too. Raises
    OutputError where the disk or the path does not allow it."""
    try:
        make_folder(path.parent)
        with new_file(path) as (part, file):
            file.writelines(pieces)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(part, path)
        if durable:
            sync_folder(path.parent)
    except OSError as e:
        raise OutputError(asked, e.strerror or str(e), "Free some space or choose another place") from None


def part_of(target: Path) -> Path:
    """A name beside ``target`` that nobody can guess."""
    return target.with_name(f".ditkit-{secrets.token_hex(6)}.part")


@contextlib.contextmanager
def new_file(target: Path, mode: int = 0o666) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside ``target``, to be renamed within the block; at its end it is gone otherwise. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with _claimed(target, lambda part: os.open(part, flags, mode)) as (part, number):
        file = os.fdopen(number, "wb", closefd=False)
        try:
            yield part, file
        finally:
            with contextlib.suppress(OSError):  # what did not fit is still in its buffer
                file.close()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """The same with a folder. ``take_place`` gives it its name."""

    def made(part: Path) -> int:
        part.mkdir()
        return os.open(part, os.O_RDONLY) if fcntl else -1

    with _claimed(target, made) as (part, _):
        yield part


@contextlib.contextmanager
def _claimed(target: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    while True:
        part, number = part_of(target), -1
        try:
            number = make(part)
            _lock(number)
            if os.path.lexists(part):  # else somebody swept it in the moment before it was locked
                yield part, number
                return
        finally:
            remove(part)
            if number >= 0:
                os.close(number)


def take_place(part: Path, target: Path) -> None:
    """``part`` gets the name ``target``, whose file or folder is replaced. A folder that is there changes places with
    it at once, where system and disk can do that. What was replaced may have the name ``part`` then. Raises OSError,
    and OutputError where the old folder lies under another name now."""
    if os.path.islink(part) or not (os.path.isdir(part) and os.path.isdir(target)):
        os.replace(part, target)
        return
    if _exchanged(part, target):
        return
    old = target.with_name(f".{target.name}.ditkit-{secrets.token_hex(6)}-{part.lstat().st_ino:x}.old")
    number = os.open(target, os.O_RDONLY) if fcntl else -1
    try:
        if number >= 0:
            _free(number)
        os.rename(target, old)
        os.rename(part, target)
    finally:  # after Ctrl-C too, which may come in the middle of a rename
        if number >= 0:
            os.close(number)
        if os.path.lexists(old) and not os.path.lexists(target):
            with contextlib.suppress(OSError):
                os.rename(old, target)
            if not os.path.lexists(target):
                found = f"{target} could not get its name back, and lies in {old} now"
                raise OutputError(f"writing {target}", found, f"Rename it: mv {old} {target}")
    os.rename(old, part)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two entries of a folder have changed places, both at once."""
    a, b, here = os.fsencode(one), os.fsencode(other), -100  # AT_FDCWD
    library = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    if (call := getattr(library, "renameat2", None)) is not None:
        return call(here, a, here, b, 2) == 0  # RENAME_EXCHANGE
    call = getattr(library, "renamex_np", None)
    return call is not None and call(a, b, 2) == 0  # RENAME_SWAP


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Alone among those who give names in ``folder``: of two writers of the same files one comes after the other."""
    number, end = -1, time.monotonic() + PATIENCE
    try:
        with contextlib.suppress(OSError):
            number = os.open(folder, os.O_RDONLY) if fcntl else -1
        while number >= 0 and not _free(number) and time.monotonic() < end:
            time.sleep(0.005)
        yield
    finally:
        if number >= 0:
            os.close(number)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in ``folder``. A folder that they had moved away, and had not replaced yet,
    gets its name back. What a living process writes stays, and so does what cannot be told."""
    names: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(".")]
    for name in names:
        old = OLD.fullmatch(name)
        if old or PART.fullmatch(name):
            _settle(folder / name, folder / old[1] if old else None, int(old[2], 16) if old else 0)


def _settle(left: Path, target: Path | None = None, heir: int = 0) -> None:
    with contextlib.suppress(OSError):
        number = os.open(left, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            if not fcntl or not _free(number):
                return
            if target is not None and not os.path.lexists(target):
                os.rename(left, target)
            elif target is None or target.lstat().st_ino == heir:
                remove(left)
        finally:
            os.close(number)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it, if it is there and that is allowed. No link is followed."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else path.unlink()


class Scratch:
    """A folder of this process where the system keeps such things, which no other user can open. Making one removes
    those that killed processes of this user left. Raises OSError."""

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        with contextlib.suppress(OSError):
            for left in root.glob(f"{OWN}*"):
                if hasattr(os, "getuid") and left.lstat().st_uid == os.getuid():
                    _settle(left)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=OWN))
            with contextlib.suppress(FileNotFoundError):
                self._number = os.open(self.path, os.O_RDONLY) if fcntl else -1
                _lock(self._number)
                if os.path.exists(self.path):
                    return

    def close(self) -> None:
        """May be called twice."""
        remove(self.path)
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)


def _lock(number: int) -> None:
    """Hold what the descriptor stands for until it is closed, where the disk can do that."""
    if fcntl and number >= 0:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)


def _free(number: int) -> bool:
    """Whether nobody else holds it; now we do. False also where the disk cannot tell."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_folder(folder: Path) -> None:
    """``folder`` and those above it, where they are not there; on the disk when this returns. Raises OSError."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        if folder.parent == folder:
            break
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)


def sync_file(file: Path) -> None:
    """The content of ``file`` is on the disk when this returns. Raises OSError."""
    number = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_folder(folder: Path) -> None:
    """Names that were given in ``folder`` are on the disk when this returns, where the system can do that. Raises
    OSError for a disk that fails."""
    if hasattr(os, "O_DIRECTORY"):  # Windows has no such thing
        number = -1
        try:
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(number)
        except OSError as e:
            if e.errno not in _CANNOT:
                raise
        finally:
            if number >= 0:
                os.close(number)

"""Children of this process that have imported all it has: with less room on the disk, with the rights of nobody, or to
be killed."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NOBODY = 65534


def fork(work: Callable[[], Any], log: Path | str = os.devnull) -> int:
    """The id of a child that does ``work`` and ends with 0, or with 99 where that raises; its words go to ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w", buffering=1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Its exit code, or minus the signal that it was killed with."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def child(work: Callable[[], Any], room: int | None = None, nobody: bool = False) -> Any:
    """What ``work`` returns, or raises, in a child. ``room``: the most bytes that a file of its may have, as if its
    disk were full then. ``nobody``: without the rights of root, who may write everywhere."""
    read, write = os.pipe()

    def told() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if nobody and os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            said = True, work()
        except BaseException as e:
            said = False, e
        with os.fdopen(write, "wb") as pipe:
            pipe.write(pickle.dumps(said))

    pid = fork(told)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    assert ended(pid) == 0, "the child ended otherwise"
    well, found = pickle.loads(data)
    if not well:
        raise found
    return found


@contextlib.contextmanager
def open_to_all(name: str = "place") -> Iterator[Path]:
    """A folder that nobody can reach too, which those of pytest are not."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    folder = root / name
    folder.mkdir()
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(root, ignore_errors=True)

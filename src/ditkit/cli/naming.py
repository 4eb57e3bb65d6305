"""The name of a clip where nobody gave one: it replaces nothing, also where several processes choose at once. Leaves
out: names that somebody gave, whose files are replaced."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ditkit.cli.flags import numbered, sheet_for
from ditkit.errors import DitkitError
from ditkit.filenames import beside, free

if TYPE_CHECKING:
    from ditkit.state import State

STATE, TRACEBACK = ".state.safetensors", ".traceback.txt"


def default_out(prompt: str, seed: int) -> Path:
    """Letters, digits and marks of every script; as many as leave room in a file name for what is added to them, and
    of those that this system can write."""
    text = unicodedata.normalize("NFC", prompt.lower())
    text = text.encode(sys.getfilesystemencoding(), "replace").decode(sys.getfilesystemencoding(), "ignore")
    words = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()
    slug = "-".join(words)[:60].encode()[:180].decode(errors="ignore").rstrip("-")
    return Path("outputs") / f"{slug or 'clip'}-{seed}.mp4"


@contextmanager
def free_out(wanted: Path, count: int, given: Path | None = None) -> Iterator[Path]:
    """``given``; else ``wanted`` or NAME_2, NAME_3, ..., the first of which nothing is there that ``count`` clips leave
    and which no other process has taken. It is this one's until the block ends."""
    if given is not None:
        yield given
        return
    with ExitStack() as stack:
        if not os.path.exists(wanted.parent):
            stack.callback(_remove_empty, wanted.parent)
            with suppress(OSError):  # told when it is looked at where the run writes
                wanted.parent.mkdir(parents=True)
        yield free(wanted, lambda path: not _taken_by_us(path, count, stack))


def _taken_by_us(path: Path, count: int, stack: ExitStack) -> bool:
    """A lock file beside the clip, not one instead of it: a process that is killed lets go of it, and of nothing a
    reader could take for a clip."""
    from filelock import FileLock, Timeout

    if any(map(os.path.lexists, leaves(path, count))):
        return False
    lock = FileLock(path.with_name(f".{path.stem}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except (OSError, NotImplementedError):  # a folder that cannot be written to is told later; some know no locks
        return True
    stack.callback(lock.release)
    stack.callback(_remove, Path(lock.lock_file))  # while it is held
    return not any(map(os.path.lexists, leaves(path, count)))


def _remove(file: Path) -> None:
    with suppress(OSError):  # Windows removes it with the lock
        file.unlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def leaves(out: Path, count: int) -> list[Path]:
    """All files that a run of ``count`` clips may leave: clips, cards, sheets, States of one that was cut off, and a
    traceback."""
    clips, sheet = numbered(out, count), sheet_for(out, None, no_sheet=False)
    assert sheet is not None
    states = numbered(beside(out, STATE), count)
    return [*clips, *(clip.with_suffix(".json") for clip in clips), *numbered(sheet, count), *states,
            beside(out, TRACEBACK)]  # fmt: skip


def state_files(out: Path, states: Sequence[State]) -> list[Path]:
    """Where States go that nobody gave a name: beside the clips. One that is there is replaced by what came after it
    in the same run, and by nothing else."""

    def taken(path: Path) -> bool:
        pairs = zip(numbered(path, len(states)), states, strict=True)
        return any(os.path.lexists(file) and not _before(file, state) for file, state in pairs)

    return numbered(free(beside(out, STATE), taken), len(states))


def _before(file: Path, state: State) -> bool:
    """Whether ``file`` is an earlier State of the same run, or this one."""
    from ditkit.state import State

    try:
        old = State.load(file)
    except DitkitError:
        return False
    same = all(old.get(name) == state.get(name) for name in ("request", "model", "prompt", "negative_prompt", "seed"))
    return same and all(_reached(old)[i] <= _reached(state)[i] for i in range(2))


def _reached(state: State) -> tuple[int, int]:
    return len(state.get("stages", [])), state.get("step", 0)

"""The kept States of a run: one file each, numbered as they came, the newest one last.

``run-000004-step-2.safetensors`` is the fourth State of the run, after two steps; ``clip-1-...`` belong to one of
several clips that are made one after the other. A new file is on the disk before older ones are let go of, so that at
every moment there is a whole one. Leaves out: what is done with them (``run.py``).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditkit.errors import OutputError, StateError
from ditkit.state import State

_NAME = re.compile(r"(run|clip-\d+)-(\d{6,})(?:-step-(\d+))?\.safetensors")
WHOLE = "run"
"""Whose States they are: of all clips together; ``clip(i)`` of one."""

Tell = Callable[[str], None]


def clip(index: int) -> str:
    return f"clip-{index}"


@dataclass(frozen=True)
class Kept:
    """One file. ``who``: ``run`` or ``clip-I``. ``step``: how many steps of the loop it has behind it, if any."""

    path: Path
    who: str
    number: int
    step: int | None

    def outline(self) -> tuple[dict[str, Any], set[str]]:
        """Plain values and names of tensors, without reading these. Raises StateError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="np") as file:
                return json.loads(file.metadata()["ditkit.state"])["plain"], set(file.keys())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise StateError(f"reading {self.path}", f"it is damaged ({e})", "Look at the older ones") from None


class KeptStates:
    """Those of one run, in ``folder``. ``keeps_first``: the first one stays, because nothing else leads to it."""

    def __init__(self, folder: Path, keeps_first: bool = False):
        self.folder, self.keeps_first = folder, keeps_first

    def of(self, who: str) -> list[Kept]:
        """The newest first."""
        found = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in self.folder.iterdir():
                if (match := _NAME.fullmatch(path.name)) and match[1] == who:
                    found.append(Kept(path, who, int(match[2]), None if match[3] is None else int(match[3])))
        return sorted(found, key=lambda kept: -kept.number)

    def save(self, who: str, state: State, only: bool) -> None:
        """Keep ``state``; if ``only``, instead of all older ones. Raises OutputError."""
        older = self.of(who)
        number = 1 + (older[0].number if older else 0)
        step = f"-step-{state['step']}" if "step" in state else ""
        state.save(self.folder / f"{who}-{number:06d}{step}.safetensors", durable=True)
        for kept in older if only else ():
            if kept.number > 1 or not self.keeps_first:
                kept.path.unlink(missing_ok=True)

    def newest(self, who: str, tell: Tell, upto: int | None = None) -> State | None:
        """The newest whole one (with at most ``upto`` steps), or None where there never was one. Damaged ones that had
        to be passed over are told of. Raises StateError when all are damaged."""
        damaged: StateError | None = None
        for kept in self.of(who):
            if upto is not None and (kept.step is None or kept.step > upto):
                continue
            try:
                state = State.load(kept.path)
            except StateError as e:
                if not kept.path.exists():  # whoever works on the run has let go of it since
                    return self.newest(who, tell, upto)
                damaged = damaged or e
                continue
            if damaged is not None:
                tell(f"a kept State is damaged and an older one, {kept.path.name}, takes its place ({damaged})")
            return state
        if damaged is not None and upto is None:
            raise damaged
        return None

    def sweep(self) -> None:
        """Remove what a process that was killed left half written. Only for who holds the lock."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all of them. Only for who holds the lock."""
        for path in self.folder.iterdir():
            if _NAME.fullmatch(path.name):
                path.unlink()

    def nbytes(self) -> tuple[int, int]:
        """How many files, and their size."""
        sizes = [path.stat().st_size for path in self.folder.glob("*.safetensors")]
        return len(sizes), sum(sizes)

    def make(self) -> None:
        """Raises OutputError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"making the folder {self.folder}", e.strerror or str(e), "Choose another place") from e


@dataclass
class Journal:
    """A Checkpointer that writes to ``states``."""

    states: KeptStates
    every: int
    only_newest: bool
    who: str = WHOLE

    def __call__(self, state: State) -> None:
        self.states.save(self.who, state, self.only_newest)

    def of_clip(self, index: int) -> Journal:
        return Journal(self.states, self.every, self.only_newest, clip(index))

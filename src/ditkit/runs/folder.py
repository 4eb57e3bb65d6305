"""RunFolder: a run as its folder holds it: what it is and how far it came.

There is ``run.json`` (what it is), ``states`` (how far it came) and ``lock``. Leaves out: beginning and going on
(``run.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.assembly.plugs import check_trusted
from ditkit.errors import OutputError, StateError
from ditkit.runs.description import NAME, Description
from ditkit.runs.kept import WHOLE, KeptStates, Tell, clip
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline
    from ditkit.state import State

FOLDER = "runs"


def located(name: str | os.PathLike[str]) -> Path:
    """The folder of a run: a bare name lies in ``runs`` under the working folder, anything else is a path."""
    text = os.path.expanduser(os.fspath(name))
    bare = isinstance(name, str) and Path(text).name == text and text not in ("", ".", "..")
    return Path(FOLDER, text).absolute() if bare else Path(text).absolute()


def given(setup: Setup) -> dict[str, Any]:
    """The settings that are not ditkit's defaults."""
    values = setup.model_dump()
    changed = {k: v for k, v in values.items() if v != type(setup).model_fields[k].get_default()}
    return {**changed, "model": setup.model}


class RunFolder:
    """``pipe`` is opened when it is first asked for."""

    def __init__(self, path: Path, description: Description, pipe: Pipeline | None = None):
        self.path, self.description, self._pipe = path, description, pipe
        spliced = description.parent is not None and description.parent.spliced
        self.states = KeptStates(path / "states", keeps_first=spliced)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def pipe(self) -> Pipeline:
        """The model, with the settings of the run. Raises LoadError, SetupError."""
        if self._pipe is None:
            import ditkit

            check_trusted(self.description.setup.get("plugs", []), f"opening the run {self.path}")
            self._pipe = ditkit.load(**self.description.setup)
        return self._pipe

    @property
    def out(self) -> Path:
        return self.path / "clip.mp4" if self.description.out is None else Path(self.description.out)

    @property
    def apart(self) -> bool:
        """Whether it makes several clips one after the other, each with States of its own."""
        return self.description.clips > 1 and not self.description.request["batched"]

    def state(self, tell: Tell = lambda _: None) -> State:
        """How far it came: all clips together; of several that are made one after the other what they have in common.
        Raises StateError."""
        asked, do = (
            f"going on with the run {self.path}",
            f"Begin it anew with `ditkit run --run`; {NAME} holds its request",
        )
        try:
            state = self.states.newest(WHOLE, tell)
        except StateError as e:
            raise StateError(asked, str(e), do) from None
        if state is None:
            raise StateError(asked, "none of its States is there", do)
        return state

    def clip_state(self, index: int, tell: Tell = lambda _: None) -> State | None:
        """How far one of several clips came that are made one after the other; None if it has not begun."""
        try:
            return self.states.newest(clip(index), tell)
        except StateError as e:
            tell(f"clip {index} begins again: its newest State is damaged and there is no older one of its own ({e})")
            return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """One process at a time; the system lets go of the lock when its process ends, however that is."""
        from filelock import FileLock, Timeout

        asked, lock = f"working on the run {self.path}", FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StateError(asked, "another process does so", "Wait for it, or end it") from None
        except OSError as e:
            raise OutputError(asked, e.strerror or str(e), "Make it writable") from None
        try:
            yield
        finally:
            lock.release()

    def sweep(self) -> None:
        """Remove what a killed process left half written in the folder."""
        import shutil

        self.states.sweep()
        for path in (*self.path.glob(".*.tmp"), *self.path.glob(".ditkit-*.part")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def opened(path: str | os.PathLike[str]) -> RunFolder:
    """Raises StateError."""
    return RunFolder(located(path), Description.read(located(path)))

"""Run: a run and its folder. It is made, goes on from wherever its process ended, and gives the same bits.

The folder holds ``run.json`` (what it is), ``states`` (how far it came) and ``lock``. Leaves out: forks (``fork.py``).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditkit import pictures, samples
from ditkit.assembly.seams import check_trusted
from ditkit.errors import OutputError, SetupError, StateError
from ditkit.events import Events, Listener
from ditkit.execution.place import Interrupted
from ditkit.request import Request
from ditkit.runs.description import NAME, Description, Parent
from ditkit.runs.kept import WHOLE, Journal, KeptStates, Tell, clip
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline, Result
    from ditkit.receipt import Recorder
    from ditkit.state import State

FOLDER = "runs"
KeepSteps = Literal["last", "all"]


def located(name: str | os.PathLike[str]) -> Path:
    """The folder of a run: a bare name lies in ``runs`` under the working folder, anything else is a path."""
    text = os.path.expanduser(os.fspath(name))
    bare = isinstance(name, str) and Path(text).name == text and text not in ("", ".", "..")
    return Path(FOLDER, text).absolute() if bare else Path(text).absolute()


class Run:
    """One run in its folder. ``pipe`` is opened when it is first asked for."""

    def __init__(self, path: Path, description: Description, pipe: Pipeline | None = None):
        self.path, self.description, self._pipe = path, description, pipe
        spliced = description.parent is not None and description.parent.spliced
        self.states = KeptStates(path / "states", keeps_first=spliced)

    # --- making and opening

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        pipe: Pipeline,
        prompt: str | list[str] = "",
        *,
        every: int = 1,
        keep_steps: KeepSteps = "last",
        out: str | os.PathLike[str] | None = None,
        **request: Any,
    ) -> Run:
        """A run that has not begun yet; all fields of Request as keywords, as when a Pipeline is called. A State is
        kept after each stage and every ``every`` steps: the newest one, or with ``keep_steps="all"`` all of them, so
        that each can be forked from. Raises StateError where there is a run already."""
        values, pixels = pictures.take({"prompt": prompt, **request})
        state = pipe.begin(pipe.request(values), pixels)
        return cls.begin(path, pipe, state, every=every, keep_steps=keep_steps, out=out)

    @classmethod
    def begin(
        cls,
        path: str | os.PathLike[str],
        pipe: Pipeline,
        state: State,
        *,
        every: int = 1,
        keep_steps: KeepSteps = "last",
        out: str | os.PathLike[str] | None = None,
        sheet: str | bool = True,
        setup: Mapping[str, Any] | None = None,
        parent: Parent | None = None,
    ) -> Run:
        """A run that goes on from ``state``. ``setup``: the settings to open its model with next time; by default all
        of the pipe's that are not ditkit's defaults."""
        folder = located(path)
        check_new(folder, every, keep_steps)
        request = state["request"]
        description = Description(
            id=uuid.uuid4().hex,
            created=datetime.now().astimezone().isoformat(timespec="milliseconds"),
            model=state["model"],
            request=request,
            setup=given(pipe.setup) if setup is None else {**setup, "model": pipe.setup.model},
            clips=samples.count(state),
            steps=len(pipe.steps(Request(**request))),
            every=every,
            keep_steps=keep_steps,
            out=None if out is None else str(Path(out).absolute()),
            sheet=sheet,
            parent=parent,
        )
        run = cls(folder, description, pipe)
        run.states.make()
        with run.held():
            check_new(folder, every, keep_steps)
            run.sweep()
            run.states.clear()  # of a process that was killed before it wrote run.json
            run.states.save(WHOLE, state, only=True)
            description.write(folder)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], pipe: Pipeline | None = None) -> Run:
        """A run that was begun, maybe by another process. ``pipe``: needed for one that was changed from Python. Raises
        StateError."""
        folder = located(path)
        return cls(folder, Description.read(folder), pipe)

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

    # --- how far it is

    def state(self, tell: Tell = lambda _: None) -> State:
        """How far it came: all clips together; of several that are made one after the other what they have in common.
        Raises StateError."""
        try:
            state = self.states.newest(WHOLE, tell)
        except StateError as e:
            raise self._lost(str(e)) from None
        if state is None:
            raise self._lost("none of its States is there")
        return state

    def clip_state(self, index: int, tell: Tell = lambda _: None) -> State | None:
        """How far one of several clips came that are made one after the other; None if it has not begun."""
        try:
            return self.states.newest(clip(index), tell)
        except StateError as e:
            tell(f"clip {index} begins again: its newest State is damaged and there is no older one of its own ({e})")
            return None

    def _lost(self, found: str) -> StateError:
        return StateError(
            f"going on with the run {self.path}",
            found,
            f"Begin it anew with `ditkit run --run`; {NAME} holds its request",
        )

    # --- running

    def go(
        self,
        *,
        until: str | None = None,
        stop_at_step: int | None = None,
        listeners: Iterable[Listener] = (),
        recorder: Recorder | None = None,
    ) -> Result:
        """From where it stands to the end, or to a point before it. Bit-equal to a run that was never interrupted.
        ``recorder``: as for ``Pipeline.run``.

        Raises Interrupted, after what was done is kept, and StateError while another process works on it."""
        listeners, description = tuple(listeners), self.description
        events = Events(*self.pipe.listeners, *listeners)

        def tell(text: str) -> None:
            events.emit("run.note", run=str(self.path), text=text)

        with self.held():
            self.sweep()
            state = self.state(tell)
            begun: dict[int, State] = {}
            if description.clips > 1 and not description.request["batched"]:
                found = {i: self.clip_state(i, tell) for i in range(description.clips)}
                begun = {i: clip_state for i, clip_state in found.items() if clip_state is not None}
            journal = Journal(self.states, description.every, description.keep_steps == "last")
            part: dict[str, Any] = {"until": until, "stop_at_step": stop_at_step, "recorder": recorder}
            try:
                result = self.pipe.run(state, begun=begun, keep=journal, listeners=listeners, **part)
            except Interrupted as e:
                self.states.save(WHOLE if e.clip is None else clip(e.clip), e.state, journal.only_newest)
                raise
        return replace(result, manifests=tuple(self._told(m) for m in result.manifests))

    def _told(self, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        parent = self.description.parent
        return manifest if parent is None else {**manifest, "fork": parent.model_dump(mode="json")}

    def fork(self, path: str | os.PathLike[str], *, at_step: int | None = None, **more: Any) -> Run:
        """A run of its own that keeps of this one all that still fits: ``run.fork("b", guidance_scale=3.0)``. With
        ``at_step`` the loop goes on from the State after so many steps. More in ``fork.py``."""
        from ditkit.runs.fork import OPTIONS, forked

        options = {name: more.pop(name) for name in OPTIONS if name in more}
        values, pixels = pictures.take(more)
        return forked(self, path, values, at_step=at_step, pixels=pixels, **options)

    # --- the folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """One process at a time; the system lets go of the lock when its process ends, however that is."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StateError(
                f"working on the run {self.path}", "another process does so", "Wait for it, or end it"
            ) from None
        except OSError as e:
            raise OutputError(f"working on the run {self.path}", e.strerror or str(e), "Make it writable") from None
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


def given(setup: Setup) -> dict[str, Any]:
    """The settings that are not ditkit's defaults."""
    values = setup.model_dump()
    changed = {k: v for k, v in values.items() if v != type(setup).model_fields[k].get_default()}
    return {**changed, "model": setup.model}


def check_new(folder: Path, every: int = 1, keep_steps: str = "last") -> None:
    """Raise what stands against a new run there."""
    if every < 1:
        raise SetupError(f"keeping a State every {every} steps", "that is never", "Give 1 or more")
    if keep_steps not in ("last", "all"):
        raise SetupError(f"keep_steps={keep_steps!r}", "it is neither of two", "Give last or all")
    if (folder / NAME).exists():
        raise StateError(
            f"beginning the run {folder}", "there is one already", f"Go on with it: --resume {folder}; or name another"
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"beginning the run {folder}", "that is a file", "Name a folder")

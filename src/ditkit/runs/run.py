"""Run: a run that is kept. It is begun, goes on from wherever its process ended, and gives the same bits; it is forked.
And ``listed``: a folder of runs at a glance. Leaves out: what its folder holds (``folder.py``), what a fork keeps
(``fork.py``)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditkit import pictures, samples
from ditkit.cancel import Cancel
from ditkit.errors import OutputError, SetupError, StateError
from ditkit.events import Events, Listener
from ditkit.execution.place import further, so_far
from ditkit.plain import counted
from ditkit.request import Request
from ditkit.runs.folder import (
    HERE,
    NAME,
    STATES,
    WHOLE,
    Description,
    Journal,
    KeptStates,
    Parent,
    RunFolder,
    Tell,
    check_no_links,
    clip,
    given,
    located,
    mark_of,
)
from ditkit.runs.fork import prepared
from ditkit.writing import make_folder

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline, Result
    from ditkit.receipt import Recorder
    from ditkit.state import State

FilePath = str | os.PathLike[str]
KeepSteps = Literal["last", "all"]


class Run(RunFolder):
    """One run in its folder."""

    @classmethod
    def create(
        cls, path: FilePath, pipe: Pipeline, prompt: str | list[str] = "", *, every: int = 1,
        keep_steps: KeepSteps = "last", out: FilePath | None = None, **request: Any,
    ) -> Run:  # fmt: skip
        """A run that has not begun yet; all fields of Request as keywords, as when a Pipeline is called. A State is
        kept after each stage and every ``every`` steps: the newest one, or with ``keep_steps="all"`` all of them, so
        that each can be forked from. Raises StateError where there is a run already."""
        values, pixels = pictures.take({"prompt": prompt, **request})
        state = pipe.begin(pipe.request(values), pixels)
        return cls.begin(path, pipe, state, every=every, keep_steps=keep_steps, out=out)

    @classmethod
    def begin(
        cls, path: FilePath, pipe: Pipeline, state: State, *, every: int = 1, keep_steps: KeepSteps = "last",
        out: FilePath | None = None, sheet: str | bool = True, setup: Mapping[str, Any] | None = None,
        parent: Parent | None = None,
    ) -> Run:  # fmt: skip
        """A run that goes on from ``state``. ``setup``: the settings to open its model with next time; by default all
        of the pipe's that are not ditkit's defaults."""
        folder, every = located(path), counted(every, "every", SetupError)
        check_new(folder, every, keep_steps)
        request = state["request"]
        description = Description(
            id=uuid.uuid4().hex, created=datetime.now().astimezone().isoformat(timespec="milliseconds"),
            model=state["model"], request=request,
            setup=given(pipe.setup) if setup is None else {**setup, "model": pipe.setup.model},
            clips=samples.count(state), steps=len(pipe.steps(Request(**request))), every=every, keep_steps=keep_steps,
            out=None if out is None else str(Path(out).absolute()), sheet=sheet, parent=parent,
        )  # fmt: skip
        description.encoded(folder)
        check_no_links(folder, f"beginning the run {folder}")
        try:
            make_folder(folder / STATES)
            (folder / HERE).touch()
        except OSError as e:
            asked = f"making the folder {folder / STATES}"
            raise OutputError(asked, e.strerror or str(e), "Choose another place") from e
        run = cls(folder, description.model_copy(update={"here": mark_of(folder)}), pipe)
        with run.held():
            check_new(folder, every, keep_steps)
            run.sweep()
            run.states.clear()  # of a process that was killed before it wrote run.json
            run.states.save(WHOLE, state, only=True)
            run.description.write(folder)
        return run

    def go(
        self, *, until: str | None = None, stop_at_step: int | None = None, listeners: Iterable[Listener] = (),
        recorder: Recorder | None = None, cancel: Cancel | None = None,
    ) -> Result:  # fmt: skip
        """From where it stands to the end, or to a point before it. Bit-equal to a run that was never interrupted.
        The keywords are those of ``Pipeline.run``.

        Raises Interrupted, or what else ended it, after what was done is kept, and StateError while another process
        works on it."""
        part = {"until": until, "stop_at_step": stop_at_step, "recorder": recorder, "cancel": cancel}
        with self.going(listeners=listeners, **part) as run:
            result = run()
        return self.with_parent(result)

    @contextmanager
    def going(self, *, listeners: Iterable[Listener] = (), **part: Any) -> Iterator[Callable[[], Result]]:
        """``with run.going() as call: result = run.with_parent(call())`` is what ``go`` does."""
        listeners, description = tuple(listeners), self.description
        events = Events(*self.pipe.listeners, *listeners)

        def tell(text: str) -> None:
            events.emit("run.note", run=str(self.path), text=text)

        with self.held():
            self.sweep()
            state = self.state(tell)
            found = {i: self.clip_state(i, tell) for i in range(description.clips if self.apart else 0)}
            begun = {i: clip_state for i, clip_state in found.items() if clip_state is not None}
            journal = Journal(self.states, description.every, description.keep_steps == "last")
            try:
                yield partial(self.pipe.run, state, begun=begun, keep=journal, listeners=listeners, **part)
            except Exception as e:
                had = so_far(e)
                if had is not None:
                    keep = journal if had.clip is None else journal.of_clip(had.clip)
                    if had is e:
                        keep(had.state)
                    elif further(had.state, state if had.clip is None else begun.get(had.clip, state)):
                        with suppress(Exception):  # what stands in the way is what ended the run, or comes after it
                            keep(had.state)
                raise

    def with_parent(self, result: Result) -> Result:
        """``result`` with manifests that tell of what the run was forked from."""
        if self.description.parent is None:
            return result
        fork = {"fork": self.description.parent.model_dump(mode="json")}
        return replace(result, manifests=tuple({**manifest, **fork} for manifest in result.manifests))

    def fork(
        self, path: FilePath, *, at_step: int | None = None, clip: int | None = None, pipe: Pipeline | None = None,
        listeners: Iterable[Listener] = (), tell: Tell = lambda _: None, every: int | None = None,
        keep_steps: KeepSteps | None = None, out: FilePath | None = None, **changes: Any,
    ) -> Run:  # fmt: skip
        """A run of its own that keeps of this one all that still fits: ``run.fork("b", guidance_scale=3.0)``. With
        ``at_step`` the loop goes on from the State after so many steps. It has not gone on yet. More in ``fork.py``;
        ``every`` and what follows it are as for ``begin``, the first two by default as here."""
        pipe, (values, pixels) = pipe or self.pipe, pictures.take(changes)
        state, parent = prepared(self, values, pipe, at_step, clip, pixels, listeners, tell, changes)
        every = self.description.every if every is None else every
        keep_steps = self.description.keep_steps if keep_steps is None else keep_steps
        return Run.begin(path, pipe, state, every=every, keep_steps=keep_steps, out=out, parent=parent)


def check_new(folder: Path, every: int = 1, keep_steps: str = "last") -> None:
    """Raise what stands against a new run there."""
    if every < 1:
        raise SetupError(f"keeping a State every {every} steps", "that is never", "Give 1 or more")
    if keep_steps not in ("last", "all"):
        raise SetupError(f"keep_steps={keep_steps!r}", "it is neither of two", "Give last or all")
    asked = f"beginning the run {folder}"
    if os.path.exists(folder / NAME):
        raise StateError(asked, "there is one already", f"Go on with it: --resume {folder}; or name another")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OutputError(asked, "that is a file", "Name a folder")


@dataclass(frozen=True)
class Listed:
    """``depth``: 0, or one more than that of the run in the same folder that it was forked from. ``progress``:
    ``done``, ``step 3 of 50``, ``clip 1 of 3, step 4 of 50``, ``begun`` or ``damaged``; ``fault`` says of a run that
    cannot be opened why."""

    path: Path
    run: Run | None
    depth: int
    progress: str
    fault: str = ""


def listed(folder: str | Path) -> list[Listed]:
    """The runs right under ``folder``, oldest first, each followed by its forks. Raises StateError."""
    folder, asked = Path(folder), f"listing the runs in {folder}"
    try:
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise StateError(asked, "there is no such folder", "Name one, or begin a run with --run") from None
    except OSError as e:
        raise StateError(asked, (e.strerror or str(e)).lower(), "Check its permissions") from None
    runs, broken = list[Run](), []
    for path in paths:
        try:
            os.lstat(path / NAME)
            runs.append(Run.open(path.absolute()))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (StateError, OSError) as e:
            fault = e if isinstance(e, StateError) else f"looking into {path}: {(e.strerror or str(e)).lower()}"
            broken.append(Listed(path, None, 0, "damaged", str(fault)))
    return [*_ordered(runs), *broken]


def _ordered(runs: list[Run]) -> list[Listed]:
    """Each run once: of a folder that was copied the first one has the forks, and runs that are each other's forks,
    which nobody made with ditkit, come last."""
    ids, forks, found = {run.description.id for run in runs}, dict[str | None, list[Run]](), list[Listed]()
    for run in sorted(runs, key=lambda run: (run.description.created, run.path.name)):
        above = run.description.parent
        forks.setdefault(above.id if above is not None and above.id in ids else None, []).append(run)
    while forks:
        waiting = [(run, 0) for run in reversed(forks.pop(None if None in forks else next(iter(forks))))]
        while waiting:
            run, depth = waiting.pop()
            found.append(Listed(run.path, run, depth, progress(run)))
            waiting += [(fork, depth + 1) for fork in reversed(forks.pop(run.description.id, []))]
    return found


def progress(run: Run) -> str:
    description = run.description
    if not run.apart:
        return _standing(run.states, WHOLE, description.steps)
    for i in range(description.clips):
        standing = _standing(run.states, clip(i), description.steps)
        if standing != "done":
            return f"clip {i + 1} of {description.clips}, {standing}"
    return "done"


def _standing(states: KeptStates, who: str, steps: int) -> str:
    try:
        kept = states.of(who)
        tensors = kept[0].outline()[1] if kept else set[str]()
    except (StateError, OSError):
        return "damaged"
    if not kept:
        return "begun"
    if "video" in tensors:
        return "done"
    return "begun" if kept[0].step is None else f"step {kept[0].step} of {steps}"

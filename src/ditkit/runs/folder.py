"""RunFolder: a run as its folder holds it: ``run.json`` (what it is, settled when it begins and never changed),
``states`` (how far it came), ``lock``, and ``.here``, which nobody can copy (``mark_of``). None of them may be a link:
what somebody sent must not lead out of the folder.

A State is one file, numbered as they came: ``run-000004-step-2.safetensors`` is the fourth of the run, after two steps;
``clip-1-...`` belong to one of several clips that are made one after the other. A new file is on the disk before older
ones are let go of, so that at every moment there is a whole one. Leaves out: beginning and going on (``run.py``)."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic import Field as Number

from ditkit.assembly.plugs import check_trusted
from ditkit.checking import check_state
from ditkit.checkpoints.model.manifest import check_fetches
from ditkit.errors import OutputError, RequestError, StateError
from ditkit.filenames import fault_of_path, shortened
from ditkit.reading import open_ordinary, parse_json, read_bytes
from ditkit.request import LATER, Request, renamed
from ditkit.setup import Setup
from ditkit.state import State
from ditkit.trust import check_places
from ditkit.writing import remove, sweep, write_whole

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline

VERSION = 1
NAME, STATES, LOCK = "run.json", "states", "lock"
FOLDER = "runs"
HERE = ".here"
_NAME = re.compile(r"(run|clip-\d+)-(\d{6,})(?:-step-(\d+))?\.safetensors")
WHOLE = "run"  # whose States they are: of all clips together; ``clip(i)`` of one
Tell = Callable[[str], None]


def located(name: str | os.PathLike[str]) -> Path:
    """The folder of a run: a bare name lies in ``runs`` under the working folder, anything else is a path. Raises
    StateError for what can be neither."""
    text = os.path.expanduser(os.fspath(name))
    if fault := fault_of_path(text) or ("" if text.strip() else "that is no name"):
        raise StateError(f"a run in the folder {shortened(text)!r}", fault, "Give a name or a path")
    bare = isinstance(name, str) and Path(text).name == text and text not in ("", ".", "..")
    return Path(FOLDER, text).absolute() if bare else Path(text).absolute()


def given(setup: Setup) -> dict[str, Any]:
    """The settings that are not ditkit's defaults."""
    changed = {k: v for k, v in setup.model_dump().items() if v != Setup.model_fields[k].get_default()}
    return {**changed, "model": setup.model}


class Parent(BaseModel):
    """What a run was forked from. ``step``: where in the loop, if a step was named; ``changed``: settings by name with
    the value before and after; ``spliced``: a part of the loop was taken with other settings, so that the request alone
    does not make this run again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    id: str
    step: int | None
    clip: int | None
    changed: dict[str, tuple[Any, Any]]
    spliced: bool


class Description(BaseModel):
    """``run.json``. ``setup``: the settings that somebody gave. ``steps``: of the loop. ``every``, ``keep_steps``: what
    is kept. ``out`` and ``sheet``: where results go; None and True stand for places in the run's own folder.
    ``here``: the mark of the folder in which it was begun."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: int = VERSION
    id: str
    created: str
    model: dict[str, Any]
    request: dict[str, Any]
    setup: dict[str, Any]
    clips: int = Number(ge=1)
    steps: int = Number(ge=1)
    every: int = Number(ge=1)
    keep_steps: Literal["last", "all"]
    out: str | None = None
    sheet: str | bool = True
    here: str | None = None
    parent: Parent | None = None

    @field_validator("model")
    @classmethod
    def _named(cls, model: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(model.get("name"), str):
            raise ValueError("it has no name")
        return model

    @field_validator("request")
    @classmethod
    def _asking(cls, request: dict[str, Any]) -> dict[str, Any]:
        """What a list of runs shows of it; all else is looked at when the run goes on."""
        prompt = request.get("prompt")
        if not all(isinstance(text, str) for text in (prompt if isinstance(prompt, list) else [prompt])):
            raise ValueError("it has no prompt")
        if not isinstance(request.get("batched"), bool):
            raise ValueError("it does not say whether its clips are batched")
        known = {name: Request.model_fields[name].get_default() for name in LATER}
        return {**known, **renamed(request)}

    def write(self, folder: Path) -> None:
        """Whole or not at all, and there for good. Raises OutputError."""
        write_whole(folder / NAME, [self.encoded(folder)], f"writing {folder / NAME}")

    def encoded(self, folder: Path) -> bytes:
        """Raises OutputError for a path of it that is no UTF-8."""
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n"
        try:
            return text.encode()
        except UnicodeEncodeError as e:
            found = f"it would hold bytes that are no UTF-8 ({text[max(0, e.start - 40) : e.end]!a})"
            raise OutputError(f"writing {folder / NAME}", found, "Choose a path in UTF-8") from None

    def checked(self, file: Path) -> Self:
        """Itself, as ``file`` says it. Raises StateError for settings that are none and for a wrong count of clips."""
        Setup.parse(self.setup, f"the setup in {file}", StateError)
        request = Request.whole(self.request, f"the request in {file}", StateError)
        try:
            count = len(request.samples())
        except RequestError as e:
            raise StateError(f"reading {file}", str(e), "Use an untouched file") from None
        if self.clips != count:
            raise StateError(f"reading {file}", f"it has {self.clips} clips, and its request asks for {count}",
                             "Use an untouched file")  # fmt: skip
        return self

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Raises StateError."""
        asked, anew = f"opening the run {folder}", "Begin the run anew elsewhere"
        check_no_links(folder, asked)
        try:
            values = parse_json(read_bytes(folder / NAME, asked, StateError, do=anew), asked, StateError, do=anew)
        except FileNotFoundError:
            do = "Check its name; `ditkit runs` lists those that are there"
            raise StateError(asked, f"there is no {NAME}", do) from None
        except StateError as e:
            raise StateError(asked, f"its {NAME} cannot be read ({e.found})", anew) from None
        version = values.get("run") if isinstance(values, dict) else None
        if version != VERSION:
            found = f"its version is {version!r}; this ditkit reads {VERSION}"
            raise StateError(asked, found, "Use the ditkit that wrote it")
        try:
            return cls(**values).checked(folder / NAME)
        except ValidationError as e:
            fault = e.errors()[0]
            found = f"its {NAME} is damaged at {'.'.join(map(str, fault['loc']))} ({fault['msg']})"
            raise StateError(asked, found, anew) from None


def mark_of(folder: Path) -> str | None:
    """What tells a folder in which a run was begun from a copy, and from one that somebody sent: the number that the
    disk gave to its file ``.here``, and when. None where there is none."""
    try:
        found = (folder / HERE).lstat()
    except OSError:
        return None
    return f"{found.st_ino:x}-{found.st_ctime_ns:x}"


def check_no_links(folder: Path, asked: str) -> None:
    """Raise StateError where a part of the run's folder is a link."""
    for name in (NAME, STATES, LOCK, HERE):
        if os.path.islink(folder / name):
            raise StateError(
                asked, f"its {name} is a link, which may lead anywhere", "Put what it stands for in its place"
            )


def clip(index: int) -> str:
    return f"clip-{index}"


@dataclass(frozen=True)
class Kept:
    """One file. ``who``: ``run`` or ``clip-I``. ``step``: how many steps of the loop it has behind it, if any."""

    path: Path
    who: str
    number: int
    step: int | None

    def load(self) -> State:
        """Raises StateError, also for a link."""
        self._check()
        return State.load(self.path)

    def _check(self) -> None:
        if os.path.islink(self.path):
            raise StateError(f"loading a State from {self.path}", "it is a link", "Put the file in its place")

    def outline(self) -> tuple[dict[str, Any], set[str]]:
        """Plain values and names of tensors, without reading these. Raises StateError."""
        from safetensors import SafetensorError, safe_open

        self._check()
        try:
            open_ordinary(self.path).close()
            with safe_open(self.path, framework="np") as file:
                return json.loads(file.metadata()["ditkit.state"])["plain"], set(file.keys())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise StateError(f"reading {self.path}", f"it is damaged ({e})", "Look at the older ones") from None


class KeptStates:
    """Those of one run, in ``folder``. ``keeps_first``: the first one stays, because nothing else leads to it."""

    def __init__(self, folder: Path, keeps_first: bool = False):
        self.folder, self.keeps_first = folder, keeps_first

    def of(self, who: str) -> list[Kept]:
        """The newest first. Raises StateError for a folder that cannot be read."""
        found = []
        try:
            for path in self.folder.iterdir():
                if (match := _NAME.fullmatch(path.name)) and match[1] == who:
                    found.append(Kept(path, who, int(match[2]), None if match[3] is None else int(match[3])))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as e:
            why = (e.strerror or str(e)).lower()
            raise StateError(f"looking for States in {self.folder}", why, "Make it readable") from None
        return sorted(found, key=lambda kept: -kept.number)

    def save(self, who: str, state: State, only: bool) -> None:
        """Keep ``state``; if ``only``, instead of all older ones. Raises OutputError."""
        older = self.of(who)
        number = 1 + (older[0].number if older else 0)
        step = f"-step-{state['step']}" if "step" in state else ""
        state.save(self.folder / f"{who}-{number:06d}{step}.safetensors")
        for kept in older if only else ():
            if kept.number > 1 or not self.keeps_first:
                remove(kept.path)

    def newest(self, who: str, tell: Tell, upto: int | None = None) -> State | None:
        """The newest whole one (with at most ``upto`` steps), or None where there never was one. Damaged ones that had
        to be passed over are told of. Raises StateError when all are damaged."""
        damaged: StateError | None = None
        waiting, seen = self.of(who), set[Path]()
        while waiting:
            kept = waiting.pop(0)
            seen.add(kept.path)
            if upto is not None and (kept.step is None or kept.step > upto):
                continue
            try:
                state = kept.load()
            except StateError as e:
                if os.path.lexists(kept.path):
                    damaged = damaged or e
                else:  # whoever works on the run has let go of it since, and there is a newer one
                    waiting = [each for each in self.of(who) if each.path not in seen]
                continue
            if damaged is not None:
                tell(f"a kept State is damaged and an older one, {kept.path.name}, takes its place ({damaged})")
            return state
        if damaged is not None and upto is None:
            raise damaged
        return None

    def sweep(self) -> None:
        """Remove what a process that was killed left half written. Only for who holds the lock."""
        sweep(self.folder)
        for path in self.folder.glob(".*.tmp"):  # of earlier versions
            remove(path)

    def clear(self) -> None:
        """Remove all of them. Only for who holds the lock."""
        for path in self.folder.iterdir():
            if _NAME.fullmatch(path.name):
                remove(path)

    def nbytes(self) -> tuple[int, int]:
        """How many files, and their size."""
        sizes = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # let go of by whoever works on the run
                sizes.append(path.lstat().st_size)
        return len(sizes), sum(sizes)


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
        return replace(self, who=clip(index))


class RunFolder:
    """``pipe`` is opened when it is first asked for."""

    def __init__(self, path: Path, description: Description, pipe: Pipeline | None = None):
        self.path, self.description, self._pipe = path, description, pipe
        spliced = description.parent is not None and description.parent.spliced
        self.states = KeptStates(path / STATES, keeps_first=spliced)

    @classmethod
    def open(cls, path: str | os.PathLike[str], pipe: Pipeline | None = None) -> Self:
        """A run that was begun, maybe by another process. ``pipe``: needed for one that was changed from Python. Raises
        StateError."""
        return cls(located(path), Description.read(located(path)), pipe)

    @property
    def pipe(self) -> Pipeline:
        """The model, with the settings of the run. Raises LoadError, SetupError."""
        if self._pipe is None:
            import ditkit

            check_trusted(self.description.setup.get("plugs", []), f"opening the run {self.path}")
            check_places(self.description.setup, {}, (), f"opening the run {self.path}", ", or open it with pipe=")
            check_fetches(str(self.description.setup.get("model", "")), (), (), f"opening the run {self.path}")
            self._pipe = ditkit.load(**self.description.setup)
        return self._pipe

    @property
    def out(self) -> Path:
        return self.path / "clip.mp4" if self.description.out is None else Path(self.description.out)

    def decides(self, place: str | Path) -> bool:
        """Whether its word is enough for writing to ``place``: that lies in its folder, or was said here."""
        here = self.description.here
        if here is not None and here == mark_of(self.path):
            return True
        return (Path(place).parent.resolve() / Path(place).name).is_relative_to(self.path.resolve())

    @property
    def apart(self) -> bool:
        """Whether it makes several clips one after the other, each with States of its own."""
        return self.description.clips > 1 and not self.description.request["batched"]

    def state(self, tell: Tell = lambda _: None) -> State:
        """How far it came: all clips together; of several that are made one after the other what they have in common.
        Raises StateError."""
        asked = f"going on with the run {self.path}"
        do = f"Begin it anew with `ditkit run --run`; {NAME} holds its request"
        try:
            state = self.states.newest(WHOLE, tell)
        except StateError as e:
            raise StateError(asked, str(e), do) from None
        if state is None:
            raise StateError(asked, "none of its States is there", do)
        check_state(state, source=f"kept in {self.path}")
        return state

    def clip_state(self, index: int, tell: Tell = lambda _: None) -> State | None:
        """How far one of several clips came that are made one after the other; None if it has not begun."""
        try:
            state = self.states.newest(clip(index), tell)
            if state is not None:
                check_state(state, source=f"kept in {self.path}")
            return state
        except StateError as e:
            tell(f"clip {index} begins again: its newest State is damaged and there is no older one of its own ({e})")
            return None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """One process at a time; the system lets go of the lock when its process ends, however that is."""
        from filelock import FileLock, Timeout

        asked = f"working on the run {self.path}"
        check_no_links(self.path, asked)
        lock = FileLock(self.path / LOCK)
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
        self.states.sweep()
        sweep(self.path)
        links = (path for path in self.path.glob(".ditkit-*.part") if os.path.islink(path))  # nobody at work makes one
        for path in (*self.path.glob(".*.tmp"), *links):  # the first are of earlier versions
            remove(path)

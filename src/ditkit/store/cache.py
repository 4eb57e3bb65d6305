"""The cache of stage results: found by all that they depend on, checked by their content, thrown away by last use.

Two keys, as in compiler caches. The first is known before a stage runs: its name, version, code, options, weights and
inputs, and the software. Under it stand results, each with the settings that its stage read and what was in the seams
if it asked for them; the one whose settings have the same values now is the one.

``FOLDER/v1/index.sqlite`` knows the entries; each is a file in ``FOLDER/v1/results``. Whoever adds or removes files
holds the write lock of the index meanwhile. Leaves out: what a key is made of (``reasons.py``)."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ditkit.errors import OutputError, SetupError, StateError
from ditkit.errors import shortened as cut
from ditkit.filenames import fault_of_path, shortened
from ditkit.plain import shown
from ditkit.reading import open_ordinary, parse_json
from ditkit.setup import Setup
from ditkit.state import State, digest
from ditkit.store import reasons
from ditkit.store.database import Database, private, text_of
from ditkit.store.hashes import HASHES
from ditkit.store.reasons import CacheKey
from ditkit.writing import new_file, sweep

LAYOUT = "v1"
RECORD = "@record"  # the field of an entry's State that is no field of a stage: settings and plugs
COMPARED = 100  # entries of a stage, the last used ones, among which the nearest is looked for to explain a miss
NAMED = 4  # differences that are told; more are counted
REMEMBERED = 1024  # entries that are gone and still known by name
NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}\.safetensors")  # of a result; whatever has another one is not ours
NAMELESS = "its class is in no file or is made in a function, or it keeps attributes that are no dataclass fields"
SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY,
    stage TEXT NOT NULL, first TEXT NOT NULL, key TEXT NOT NULL UNIQUE,
    about TEXT NOT NULL, file TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL,
    made REAL NOT NULL, machine TEXT NOT NULL, used INTEGER NOT NULL, gone TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_first ON entries (first);
CREATE INDEX IF NOT EXISTS by_stage ON entries (stage, used);
CREATE INDEX IF NOT EXISTS by_use ON entries (gone, used, size);
"""

SOUND = ("typeof(size) = 'integer' AND size >= 0 AND typeof(file) = 'text' AND file GLOB '*.safetensors'"
         " AND instr(file, char(0)) = 0")  # fmt: skip
"""Of a row that says what ``_add`` wrote. What is behind any other one, ``_sweep`` finds."""

_NOW = "(SELECT COALESCE(MAX(used), 0) + 1 FROM entries)"  # counts uses: clocks may go back


@dataclass(frozen=True)
class StageResult:
    """``written``: the fields that the stage wrote. ``settings``: those that it read, with their values. ``plugs``:
    what was in the seams, None if it never asked for them; that is not the same as nothing. ``stopped``: it was
    interrupted; ``written`` is as far as it came. Not ``cacheable``: a makeshift, which must not serve other runs."""

    written: Mapping[str, Any]
    settings: Mapping[str, Any]
    plugs: Mapping[str, list[str]] | None
    stopped: bool = False
    cacheable: bool = True


class Cache:
    """Threads and processes may share a folder. What goes wrong with it is said in the reasons that ``find`` and
    ``store`` give; a run goes on without it. ``fault``: why nothing can be written to it, or not even read, or nothing;
    it may be a disk that is full, read-only or without locks, or an index that is damaged or of another version."""

    def __init__(self, folder: str | os.PathLike[str], limit: int):
        """``limit``: bytes of all results together. Raises SetupError for what is no folder."""
        self.folder, self.limit = Path(folder), limit
        self.results = self.folder / LAYOUT / "results"
        check_no_links(self.folder)
        self.fault, self._index = "", None
        if above := [f for f in (self.results, *self.results.parents) if os.path.lexists(f) and not os.path.isdir(f)]:
            raise SetupError(
                f"the cache {folder}", f"{above[0]} is no folder", "Choose another folder, or remove this one"
            )
        try:
            with contextlib.suppress(OSError):  # one that is read-only may have all that is looked for
                private(self.results)
            self._index = Database(self.results.parent / "index.sqlite", SCHEMA)
            self.fault = self._index.fault
            if not self.fault:
                self._sweep()
        except (OSError, sqlite3.Error) as e:
            self.fault = text_of(e)

    @property
    def told(self) -> str:
        """What a person should know of ``fault``, or of hashes that are not kept, or nothing."""
        if not self.fault:
            again = f"the cache {self.folder} keeps no hashes of files, which are read each time ({HASHES.fault})"
            return again if HASHES.fault else ""
        goes_on = "is not used" if self._index is None else "is only read"
        return f"the cache {self.folder} {goes_on} ({self.fault})"

    @property
    def index(self) -> Database:
        """Raises sqlite3.DatabaseError where it could not be opened."""
        if self._index is None:
            raise sqlite3.DatabaseError(self.fault)
        return self._index

    def find(self, key: CacheKey) -> tuple[StageResult | None, str]:
        """A result, and when and where it was made; or None, and what the nearest one was made from instead."""
        found, why = self._find(key)
        return found, cut(why)

    def _find(self, key: CacheKey) -> tuple[StageResult | None, str]:
        if why := _unknowable(key):
            return None, why
        try:
            with self.index.reading() as db:
                same = "SELECT id, about, file, sha256, made, machine FROM entries WHERE first = ? AND gone = ''"
                rows = db.execute(f"{same} ORDER BY used DESC", (_first(key),)).fetchall()
            for number, about, file, sha256, made, machine in rows:
                if reasons.fits(_about(about), key):
                    found = self._read(number, file, sha256, key)
                    return (None, found) if isinstance(found, str) else (found, f"made on {_date(made)} on {machine}")
            return None, self._nearest(key)
        except (OSError, sqlite3.Error) as e:
            return None, f"the cache cannot be read ({text_of(e)})"
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as e:  # whatever damage leads to
            return None, f"the index of the cache is damaged ({shown(e)}); `ditkit cache clear` makes a new one"

    def _read(self, number: int, file: str, sha256: str, key: CacheKey) -> StageResult | str:
        """An entry; or, as it is no more, why it cannot be used. It is what its bytes say, whatever the index says."""
        try:
            with open_ordinary(self.results / Path(file).name) as stream:
                data = stream.read()
        except FileNotFoundError:
            self._drop(number, "its file is gone")
            return "its file was removed a moment ago, or by hand"
        except OSError as e:
            return f"its file cannot be read ({text_of(e)})"
        try:
            if hashlib.sha256(data).hexdigest() != sha256:
                raise StateError(f"reading {file}", "its bytes are others", "Make it again")
            state = State.from_bytes(data, file)
            record = state[RECORD]
            if record["first"] != _first(key) or not reasons.fits(record, key):
                raise StateError(f"reading {file}", "it is the result of something else", "Make it again")
        except (StateError, LookupError):
            gone = self._drop(number, "its file was damaged")
            return f"its file was damaged{', and is removed' if gone else ''}"
        with contextlib.suppress(sqlite3.Error), self.index.writing() as db:
            db.execute(f"UPDATE entries SET used = {_NOW} WHERE id = ?", (number,))
        return StageResult({k: state[k] for k in state if k != RECORD}, record["settings"], record["plugs"])

    def _drop(self, number: int, why: str) -> bool:
        """Whether it could be let go of."""
        with contextlib.suppress(OSError, sqlite3.Error), self.index.writing() as db:
            self._remove(db, db.execute("SELECT id, file FROM entries WHERE id = ? AND gone = ''", (number,)), why)
            return True
        return False

    def _nearest(self, key: CacheKey) -> str:
        with self.index.reading() as db:
            latest = "SELECT about, made, gone FROM entries WHERE stage = ? ORDER BY used DESC LIMIT ?"
            rows = db.execute(latest, (key.stage, COMPARED)).fetchall()
        if not rows:
            return f"no result of {key.stage} is kept"
        found = [(reasons.differences(_about(about), key, _software(key)), made, gone)
                 for about, made, gone in rows]  # fmt: skip
        differences, made, gone = min(found, key=lambda row: len(row[0]))
        if not differences:
            return f"it was made on {_date(made)}, and {gone or 'was not there a moment ago'}"
        more = f" and {len(differences) - NAMED} more" if len(differences) > NAMED else ""
        return f"the nearest one differs: {', '.join(differences[:NAMED])}{more}"

    def store(self, key: CacheKey, outcome: StageResult) -> str:
        """Keep it, and let go of what was not used for the longest time. Why it was not kept, or nothing."""
        if outcome.stopped:
            return "it is not complete"
        if why := _unknowable(key):
            return why
        if plugs := reasons.unlasting(outcome.plugs or {}):
            return f"{plugs[0].partition('#')[0]} has no name that lasts, so nothing would find the result"
        record = {"first": _first(key), "settings": dict(outcome.settings), "plugs": outcome.plugs}
        data = State({**outcome.written, RECORD: record}).to_bytes(summed=False)
        if len(data) > self.limit:
            return f"it has {len(data) / 1e6:.1f} MB, the cache may have {self.limit / 1e6:.1f} MB"
        try:
            self._add(key, record, data)
        except (OSError, sqlite3.Error) as e:
            return f"the cache cannot be written ({text_of(e)})"
        return ""

    def _add(self, key: CacheKey, record: Mapping[str, Any], data: bytes) -> None:
        about = json.dumps({**reasons.describe(key, _software(key)), **record}, sort_keys=True)
        first = record["first"]
        whole = digest(dict(record))
        file = f"{whole[:32]}-{secrets.token_hex(4)}.safetensors"
        with new_file(self.results / file, 0o600) as (part, stream):
            stream.write(data)
            stream.flush()
            with self.index.writing() as db:
                if db.execute("SELECT 1 FROM entries WHERE key = ? AND gone = ''", (whole,)).fetchone():
                    return  # another process was faster
                self._shrink(db, self.limit - len(data))
                os.replace(part, self.results / file)
                db.execute(
                    "INSERT OR REPLACE INTO entries"
                    " (stage, first, key, about, file, sha256, size, made, machine, used, gone)"
                    f" VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, {_NOW}, '')",
                    (key.stage, first, whole, about, file, hashlib.sha256(data).hexdigest(), len(data),
                     time.time(), platform.node() or "this machine"),
                )  # fmt: skip

    def _shrink(self, db: sqlite3.Connection, room: int) -> int:
        """Under the write lock: evict until what is left has at most ``room`` bytes. Bytes that were freed."""
        db.execute(f"DELETE FROM entries WHERE gone = '' AND NOT ({SOUND})")
        size = before = db.execute("SELECT COALESCE(SUM(size), 0) FROM entries WHERE gone = ''").fetchone()[0]
        oldest = "SELECT id, file, size FROM entries WHERE gone = '' ORDER BY used, id LIMIT 1"
        while size > room and (row := db.execute(oldest).fetchone()):
            self._remove(db, [row[:2]], "was evicted to make room")
            size -= row[2]
        db.execute(
            "DELETE FROM entries WHERE gone != '' AND id NOT IN"
            " (SELECT id FROM entries WHERE gone != '' ORDER BY used DESC LIMIT ?)", (REMEMBERED,)
        )  # fmt: skip
        return before - size

    def _remove(self, db: sqlite3.Connection, rows: Any, why: str) -> None:
        """Under the write lock. Who has the file open reads it to its end."""
        for number, file in rows:
            if isinstance(file, str) and NAME.fullmatch(file):  # never beside the folder
                (self.results / file).unlink(missing_ok=True)
            db.execute("UPDATE entries SET gone = ?, size = 0, file = '' WHERE id = ?", (why, number))

    def _sweep(self) -> None:
        """Remove files that no entry knows and entries without a file: somebody died between two steps."""
        sweep(self.results)
        with self.index.writing() as db:
            known = {file: number for number, file in db.execute("SELECT id, file FROM entries WHERE gone = ''")}
            there = {file for file in os.listdir(self.results) if NAME.fullmatch(file)}
            for file in there - {*known}:
                (self.results / file).unlink(missing_ok=True)
            self._remove(db, [(known[file], file) for file in {*known} - there], "its file is gone")

    def contents(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes of each stage, the largest first. Raises OutputError."""
        with self._told(), self.index.reading() as db:
            rows = db.execute("SELECT stage, COUNT(*), SUM(size) FROM entries WHERE gone = '' GROUP BY stage"
                              " ORDER BY SUM(size) DESC, stage").fetchall()  # fmt: skip
            return {stage: (count, size) for stage, count, size in rows}

    def trim(self) -> int:
        """Evict down to the limit; bytes that were freed. Raises OutputError."""
        with self._told():
            self._sweep()
            with self.index.writing() as db:
                return self._shrink(db, self.limit)

    def clear(self) -> int:
        """Forget everything, also where the index cannot be read; bytes that were freed. Raises OutputError."""
        with self._told():
            if self._index is None:
                return self._begin_anew()
            with self.index.writing() as db:
                freed = self._shrink(db, -1)
                db.execute("DELETE FROM entries")
            return freed

    def _begin_anew(self) -> int:
        files = [file for file in self.results.iterdir() if NAME.fullmatch(file.name)]
        freed = sum(file.lstat().st_size for file in files)
        Database.remove(self.results.parent / "index.sqlite")
        for file in files:
            file.unlink(missing_ok=True)
        self._index, self.fault = Database(self.results.parent / "index.sqlite", SCHEMA), ""
        return freed

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as e:
            do = "Remove the folder, or begin it anew with `ditkit cache clear`"
            raise OutputError(f"the cache {self.folder}", text_of(e), do) from None


def check_no_links(folder: Path) -> None:
    """Raise SetupError where a part of the cache is a link: results that no entry knows are removed, and nothing
    outside of the folder may be."""
    inner = folder / LAYOUT
    parts = [inner]
    with contextlib.suppress(OSError):  # it is not there, or not for us to read
        parts += inner.iterdir()
    for part in parts:
        if os.path.islink(part):
            found = f"{part} is a link, which may lead anywhere"
            raise SetupError(f"the cache {folder}", found, "Choose another folder, or remove this one")


def folder_of(setting: str) -> Path:
    """What the setting ``cache`` means: a folder, or ``default`` for that of the user, where the system has it. Raises
    SetupError for what can be no folder."""
    if fault := fault_of_path(setting) or ("" if setting.strip() else "that is no name"):
        raise SetupError(f"the cache {shortened(setting)!r}", fault, "Name a folder, or default")
    if setting != "default":
        return Path(os.path.expanduser(setting)).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ditkit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditkit"


def open_cache(setup: Setup) -> Cache | None:
    """That of a Setup, None if it has none. Raises SetupError for what is no folder."""
    return None if setup.cache is None else Cache(folder_of(setup.cache), int(setup.cache_gigabytes * 1e9))


def remember_hashes(setup: Setup) -> None:
    """Beside the results, for whoever has a cache: nothing is written to disk that nobody asked for. Where that cannot
    be, files are read each time, and ``open_cache`` says why."""
    if setup.cache is not None:
        check_no_links(folder_of(setup.cache))
        folder = folder_of(setup.cache) / LAYOUT
        with contextlib.suppress(OSError):  # it may be there and read-only
            private(folder)
        HASHES.keep_in(folder)


@functools.cache
def software() -> Mapping[str, str]:
    """What computes: ditkit by its source text, as it may change under one version, and the libraries under it."""
    package = Path(__file__).parents[1]
    text = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        text.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return {"ditkit": text.hexdigest()[:12], "torch": version("torch"), "transformers": version("transformers")}


def _about(text: Any) -> Any:
    """What an entry knows of itself. Raises StateError for what is no JSON, TypeError for what is no text."""
    if not isinstance(text, str):
        raise TypeError("an entry's description is no text")
    return parse_json(text, "reading an entry", StateError)


def _first(key: CacheKey) -> str:
    return digest(reasons.describe(key, _software(key)))


def _software(key: CacheKey) -> dict[str, str]:
    """What computes there: as here, but for what the key says."""
    return {**software(), **key.software}


def _unknowable(key: CacheKey) -> str:
    """Why results of this key cannot be told from others, or nothing."""
    if nameless := [name for name, found in key.weights.items() if found == "none"]:
        return f"{nameless[0]} has no fingerprint, so nothing tells it from another one"
    if not key.code:
        return f"nothing tells it from another {key.stage}: {NAMELESS}"
    return ""


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

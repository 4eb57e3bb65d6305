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
import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ditkit.errors import DitkitError, OutputError, SetupError, StateError
from ditkit.filenames import fault_of_path, shortened
from ditkit.setup import Setup
from ditkit.state import State, digest
from ditkit.store import reasons
from ditkit.store.database import Database, private
from ditkit.store.hashes import HASHES
from ditkit.store.reasons import CacheKey

LAYOUT = "v1"
RECORD = "@record"  # the field of an entry's State that is no field of a stage: settings and plugs
COMPARED = 100  # entries of a stage, the last used ones, among which the nearest is looked for to explain a miss
NAMED = 4  # differences that are told; more are counted
REMEMBERED = 1024  # entries that are gone and still known by name
ABANDONED = 3600.0  # seconds after which a file that nobody finished belongs to a process that died
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
    ``store`` give; a run goes on without it."""

    def __init__(self, folder: str | os.PathLike[str], limit: int):
        """``limit``: bytes of all results together. Raises SetupError where the folder cannot be used."""
        self.folder, self.limit = Path(folder), limit
        self.results = self.folder / LAYOUT / "results"
        check_no_links(self.folder)
        with _usable(self.folder, SetupError, "Choose another folder, or remove this one"):
            private(self.results)
            self.index = Database(self.results.parent / "index.sqlite", SCHEMA)
            self._sweep()

    def find(self, key: CacheKey) -> tuple[StageResult | None, str]:
        """A result, and when and where it was made; or None, and what the nearest one was made from instead."""
        if why := _unknowable(key):
            return None, why
        try:
            with self.index.reading() as db:
                same = "SELECT id, about, file, sha256, made, machine FROM entries WHERE first = ? AND gone = ''"
                rows = db.execute(f"{same} ORDER BY used DESC", (_first(key),)).fetchall()
            for number, about, file, sha256, made, machine in rows:
                if reasons.fits(json.loads(about), key):
                    found = self._read(number, file, sha256)
                    return (None, found) if isinstance(found, str) else (found, f"made on {_date(made)} on {machine}")
            return None, self._nearest(key)
        except (OSError, sqlite3.Error) as e:
            return None, f"the cache cannot be read ({_text(e)})"
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as e:  # whatever damage leads to
            return None, f"the index of the cache is damaged ({e!r}); `ditkit cache clear` makes a new one"

    def _read(self, number: int, file: str, sha256: str) -> StageResult | str:
        """An entry; or, as it is no more, why it cannot be used."""
        try:
            data = (self.results / Path(file).name).read_bytes()
        except FileNotFoundError:
            self._drop(number, "its file is gone")
            return "its file was removed a moment ago, or by hand"
        try:
            if hashlib.sha256(data).hexdigest() != sha256:
                raise StateError(f"reading {file}", "its bytes are others", "Make it again")
            state = State.from_bytes(data, file)
        except StateError:
            self._drop(number, "its file was damaged")
            return "its file was damaged, and is removed"
        with contextlib.suppress(sqlite3.Error), self.index.writing() as db:
            db.execute(f"UPDATE entries SET used = {_NOW} WHERE id = ?", (number,))
        record = state[RECORD]
        return StageResult({k: state[k] for k in state if k != RECORD}, record["settings"], record["plugs"])

    def _drop(self, number: int, why: str) -> None:
        with self.index.writing() as db:
            self._remove(db, db.execute("SELECT id, file FROM entries WHERE id = ? AND gone = ''", (number,)), why)

    def _nearest(self, key: CacheKey) -> str:
        with self.index.reading() as db:
            latest = "SELECT about, made, gone FROM entries WHERE stage = ? ORDER BY used DESC LIMIT ?"
            rows = db.execute(latest, (key.stage, COMPARED)).fetchall()
        if not rows:
            return f"no result of {key.stage} is kept"
        found = [(reasons.differences(json.loads(about), key, _software(key)), made, gone)
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
        record = {"settings": dict(outcome.settings), "plugs": outcome.plugs}
        data = State({**outcome.written, RECORD: record}).to_bytes()
        if len(data) > self.limit:
            return f"it has {len(data) / 1e6:.1f} MB, the cache may have {self.limit / 1e6:.1f} MB"
        try:
            self._add(key, record, data)
        except (OSError, sqlite3.Error) as e:
            return f"the cache cannot be written ({_text(e)})"
        return ""

    def _add(self, key: CacheKey, record: Mapping[str, Any], data: bytes) -> None:
        about = json.dumps({**reasons.describe(key, _software(key)), **record}, sort_keys=True)
        first = _first(key)
        whole = digest(first, dict(record))
        file = f"{whole[:32]}-{secrets.token_hex(4)}.safetensors"
        temporary = self.results / f"{file}.tmp"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(data)
            with self.index.writing() as db:
                if db.execute("SELECT 1 FROM entries WHERE key = ? AND gone = ''", (whole,)).fetchone():
                    return  # another process was faster
                self._shrink(db, self.limit - len(data))
                os.replace(temporary, self.results / file)
                db.execute(
                    "INSERT OR REPLACE INTO entries"
                    " (stage, first, key, about, file, sha256, size, made, machine, used, gone)"
                    f" VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, {_NOW}, '')",
                    (key.stage, first, whole, about, file, hashlib.sha256(data).hexdigest(), len(data),
                     time.time(), platform.node() or "this machine"),
                )  # fmt: skip
        finally:
            with contextlib.suppress(OSError):  # renamed, or never made
                temporary.unlink()

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
            (self.results / Path(file).name).unlink(missing_ok=True)  # never beside the folder
            db.execute("UPDATE entries SET gone = ?, size = 0, file = '' WHERE id = ?", (why, number))

    def _sweep(self) -> None:
        """Remove files that no entry knows: somebody died between two steps."""
        with self.index.writing() as db:
            known = {file for (file,) in db.execute("SELECT file FROM entries WHERE gone = ''")}
            for file in self.results.iterdir():
                with contextlib.suppress(FileNotFoundError):  # whoever wrote it has just finished
                    left = file.suffix == ".tmp" and time.time() - file.stat().st_mtime > ABANDONED
                    if left or (file.suffix == ".safetensors" and file.name not in known):
                        file.unlink()

    def contents(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes of each stage, the largest first. Raises OutputError."""
        with _usable(self.folder), self.index.reading() as db:
            rows = db.execute("SELECT stage, COUNT(*), SUM(size) FROM entries WHERE gone = '' GROUP BY stage"
                              " ORDER BY SUM(size) DESC, stage").fetchall()  # fmt: skip
            return {stage: (count, size) for stage, count, size in rows}

    def trim(self) -> int:
        """Evict down to the limit; bytes that were freed. Raises OutputError."""
        with _usable(self.folder):
            self._sweep()
            with self.index.writing() as db:
                return self._shrink(db, self.limit)

    def clear(self) -> int:
        """Forget everything; bytes that were freed. Raises OutputError."""
        with _usable(self.folder), self.index.writing() as db:
            freed = self._shrink(db, -1)
            db.execute("DELETE FROM entries")
        return freed


def check_no_links(folder: Path) -> None:
    """Raise SetupError where a part of the cache is a link: results that no entry knows are removed, and nothing
    outside of the folder may be."""
    inner = folder / LAYOUT
    for part in (inner, *(inner.glob("*") if inner.is_dir() else ())):
        if part.is_symlink():
            found = f"{part} is a link, which may lead anywhere"
            raise SetupError(f"the cache {folder}", found, "Choose another folder, or remove this one")


def folder_of(setting: str) -> Path:
    """What the setting ``cache`` means: a folder, or ``default`` for that of the user, where the system has it. Raises
    SetupError for what can be no folder."""
    if fault := fault_of_path(setting) or ("" if setting.strip() else "that is no name"):
        raise SetupError(f"the cache {shortened(setting)!r}", fault, "Name a folder, or default")
    if setting != "default":
        return Path(setting).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ditkit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditkit"


def open_cache(setup: Setup) -> Cache | None:
    """That of a Setup, None if it has none. Raises SetupError."""
    return None if setup.cache is None else Cache(folder_of(setup.cache), int(setup.cache_gigabytes * 1e9))


def remember_hashes(setup: Setup) -> None:
    """Beside the results, for whoever has a cache: nothing is written to disk that nobody asked for. Raises
    SetupError."""
    if setup.cache is not None:
        folder = folder_of(setup.cache)
        check_no_links(folder)
        with _usable(folder, SetupError, "Choose another folder, or remove this one"):
            HASHES.keep_in(private(folder / LAYOUT))


@functools.cache
def software() -> Mapping[str, str]:
    """What computes: ditkit by its source text, as it may change under one version, and the libraries under it."""
    package = Path(__file__).parents[1]
    text = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        text.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return {"ditkit": text.hexdigest()[:12], "torch": version("torch"), "transformers": version("transformers")}


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


def _text(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


@contextlib.contextmanager
def _usable(folder: Path, error: type[DitkitError] = OutputError, do: str = "Remove the folder") -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as e:
        raise error(f"the cache {folder}", _text(e), do) from None

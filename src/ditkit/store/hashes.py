"""Hashes of files, so that a file is read once and not in each process: a text encoder has 11 GB.

A hash counts as long as the file is the same one (real path, inode) and unchanged (size, mtime and ctime in ns). The
ctime is what makes this safe: nobody can set it back, as one can the mtime. A file that changed within the last two
seconds is not remembered, because a clock's tick could hide the next change; git calls such files racily clean."""

import contextlib
import hashlib
import os
import re
import sqlite3
import threading
import time
from pathlib import Path

from ditkit.store.database import Database, text_of

SETTLED = 2.0  # seconds; the coarsest clock among file systems in use is that of FAT
_SHA256 = re.compile("[0-9a-f]{64}")
SCHEMA = "CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sha256 TEXT NOT NULL)"


class Hashes:
    """sha256 of files, remembered by this process and, after ``keep_in``, on disk. A disk that fails costs time only,
    for then the files are read. ``fault``: why they are not kept on disk as was asked, or nothing."""

    def __init__(self) -> None:
        self.fault = ""
        self._known: dict[str, tuple[str, str]] = {}
        self._database: Database | None = None
        self._lock = threading.Lock()

    def keep_in(self, folder: Path) -> None:
        file = folder / "hashes.sqlite"
        with self._lock:
            if self._database is not None and self._database.file == file and not self.fault:
                return
            self._database, self.fault = None, ""
            try:
                self._database = Database(file, SCHEMA)
                fault = self._database.fault
            except (sqlite3.Error, OSError) as e:
                fault = text_of(e)
            self.fault = f"{file.name}: {fault}" if fault else ""

    def of(self, file: Path) -> str:
        """Hex digest. Raises OSError."""
        path = os.path.realpath(file)
        before = os.stat(path)
        stamp = _stamp(before)
        known = self._known.get(path) or self._read(path)
        if known is not None and known[0] == stamp:
            self._known[path] = known
            return known[1]
        begun = time.time()
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        changed = max(before.st_mtime, before.st_ctime)
        if _stamp(os.stat(path)) == stamp and begun - changed >= SETTLED:
            self._known[path] = (stamp, found)
            self._write(path, stamp, found)
        return found

    def _read(self, path: str) -> tuple[str, str] | None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error, OSError), self._database.reading() as db:
                found = db.execute("SELECT stamp, sha256 FROM hashes WHERE path = ?", (path,)).fetchone()
                return found if found and isinstance(found[1], str) and _SHA256.fullmatch(found[1]) else None
        return None

    def _write(self, path: str, stamp: str, found: str) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error, OSError), self._database.writing() as db:
                db.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", (path, stamp, found))


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


HASHES = Hashes()
"""Of this process. They are content, so who asks does not matter."""

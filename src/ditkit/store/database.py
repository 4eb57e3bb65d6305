"""A sqlite file that several processes and threads use at once: a connection for each piece of work, none that a fork
could inherit. One that cannot be written, because its disk is full, read-only or without locks, is read all the same.
Leaves out: what is in it."""

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

WAIT = 60.0  # seconds to wait for another process that writes
BESIDE = ("", "-wal", "-shm", "-journal")  # ends of the names of sqlite's files


def private(folder: Path) -> Path:
    """``folder``, made if it is not there, as are those above it; what is made here nobody else can read. Prompts are
    private. Raises OSError."""
    if not os.path.isdir(folder):
        private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Database:
    """``schema``: statements that make its tables where they are not there; ``version``: of these tables. ``fault``:
    why it can only be read, or nothing. Raises sqlite3.Error and OSError where it cannot even be read."""

    def __init__(self, file: Path, schema: str, version: int = 1):
        self.file, self.version, self.fault = file, version, ""
        for end in BESIDE:  # a pipe would be waited for
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(mode := os.lstat(f"{file}{end}").st_mode):
                    what = "a link" if stat.S_ISLNK(mode) else "no ordinary file"
                    raise OSError(0, f"{file.name}{end} is {what}")
        try:
            self._begin(schema)
        except (sqlite3.OperationalError, OSError) as e:
            self.fault = text_of(e)
            try:
                self._check()
            except (sqlite3.Error, OSError):
                raise e from None

    def _begin(self, schema: str) -> None:
        end = time.monotonic() + WAIT
        while True:
            try:
                with self.reading() as db:
                    db.execute("PRAGMA journal_mode=WAL")
                    self._compare(db)
                    db.executescript(schema)
                    db.execute(f"PRAGMA user_version={self.version}")
                return
            except sqlite3.OperationalError as e:  # sqlite does not wait for a change of the mode
                if "locked" not in str(e) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _check(self) -> None:
        with self.reading() as db:
            self._compare(db)
            db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()

    def _compare(self, db: sqlite3.Connection) -> None:
        (found,) = db.execute("PRAGMA user_version").fetchone()
        if found not in (0, self.version):
            raise sqlite3.DatabaseError(f"it is of version {found}, and this ditkit knows version {self.version}")

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        if self.fault:  # no locks and no file beside it, so that a disk without room for them can be read
            name = f"file:{quote(str(self.file.absolute()))}?mode=ro&immutable=1"
            connection = sqlite3.connect(name, timeout=WAIT, isolation_level=None, uri=True)
        else:
            connection = sqlite3.connect(self.file, timeout=WAIT, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous=NORMAL")
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, and nobody else writes meanwhile; others read what was there before."""
        if self.fault:
            raise sqlite3.OperationalError(self.fault)
        with self.reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:  # a full disk ends it
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @staticmethod
    def remove(file: Path) -> None:
        """All of its files; of links the links. Raises OSError."""
        for end in BESIDE:
            Path(f"{file}{end}").unlink(missing_ok=True)


def text_of(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()

"""A sqlite file that several processes and threads use at once: a connection for each piece of work, none that a fork
could inherit. Leaves out: what is in it."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

WAIT = 60.0  # seconds to wait for another process that writes


def private(folder: Path) -> Path:
    """``folder``, made if it is not there, as are those above it; what is made here nobody else can read. Prompts are
    private. Raises OSError."""
    if not folder.is_dir():
        private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Database:
    """``schema``: statements that make its tables where they are not there. Raises sqlite3.Error, OSError."""

    def __init__(self, file: Path, schema: str):
        self.file = file
        end = time.monotonic() + WAIT
        while True:
            try:
                with self.reading() as db:
                    db.execute("PRAGMA journal_mode=WAL")
                    db.executescript(schema)
                return
            except sqlite3.OperationalError as e:  # sqlite does not wait for a change of the mode
                if "locked" not in str(e) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.file, timeout=WAIT, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous=NORMAL")
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, and nobody else writes meanwhile; others read what was there before."""
        with self.reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

"""The file of a durable bus: its tables, how it is opened, and how one comes to write to it.

Several processes may open one at once that is not there yet. Times in it are of the clock of the
machine, which all its processes share and nobody sets.
"""

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from esper.errors import BusError, InputError, SchemaVersionError, ServiceUnavailableError
from esper.oona._store import PARTITIONS
from esper.oona._stored import check_partitions

Synchronous = Literal["normal", "full"]
"""Whether what was published outlives a process that is killed, or a power cut too."""

T = TypeVar("T")

SCHEMA_VERSION = 1
_APPLICATION = 0x4F6F6E61
"""By which a file is known as one of these."""
_BUSY_SECONDS = 30.0
_LONGEST_PAUSE = 0.002
_CHECKPOINT_PAGES = 400
"""Of the log that are written before they are copied to their places, which waits for the disk.

Ten times as many take a tenth off the time of a message, and hold up one in fifty by 15 to 30 ms.
"""

_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE topics (
    number INTEGER PRIMARY KEY,
    topic TEXT NOT NULL UNIQUE,
    last INTEGER NOT NULL DEFAULT 0,  -- the number of the message that came last
    length INTEGER NOT NULL DEFAULT 0,
    dropped INTEGER NOT NULL DEFAULT 0
);
-- A slot is a partition of a topic: number * partitions + partition. A position is a slot and, in
-- its lower bits, the number of the message in its topic: what is read together lies together.
CREATE TABLE messages (
    position INTEGER PRIMARY KEY,
    only TEXT,  -- the one group that it is for
    id TEXT UNIQUE,  -- the message's own and its topic's number
    body BLOB NOT NULL
);
CREATE INDEX messages_for_one ON messages (position, only) WHERE only IS NOT NULL;
CREATE TABLE cursors (
    grp TEXT, slot INTEGER, position INTEGER NOT NULL,  -- of what was delivered last
    token TEXT NOT NULL DEFAULT '', until REAL NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (grp, slot)
) WITHOUT ROWID;
CREATE TABLE pending (
    grp TEXT, position INTEGER,
    attempts INTEGER NOT NULL,
    token TEXT NOT NULL,  -- of who has it; empty where it was given back
    PRIMARY KEY (grp, position)
) WITHOUT ROWID;
CREATE TABLE members (
    grp TEXT, number INTEGER, name TEXT,
    token TEXT NOT NULL, until REAL NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (grp, number, name)
) WITHOUT ROWID;
CREATE TABLE letters (
    letter INTEGER PRIMARY KEY AUTOINCREMENT,
    number INTEGER NOT NULL,
    grp TEXT NOT NULL, reason TEXT NOT NULL, attempts INTEGER NOT NULL, at REAL NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX letters_by_topic ON letters (number, letter);
"""


class Database:
    """How the file of a bus is opened.

    Args:
        path: the file, which is made where it is not there.
        synchronous: see `Synchronous`.
        partitions: of each topic; None for what there is, or the usual number.

    Raises:
        InputError: for a file of somebody else, a folder that is not there, or other partitions.
        SchemaVersionError: for a file that a newer version of Esper made.
        BusError: where it cannot be opened.
    """

    def __init__(self, path: Path, synchronous: Synchronous, partitions: int | None) -> None:
        self.path = path.absolute()
        self._synchronous = synchronous
        if not self.path.parent.is_dir():
            raise InputError(
                f"there is no folder {self.path.parent} for the bus {self.path.name}: make it first"
            )
        with self.errors():
            connection = self.connect()
            try:
                with writing(connection):
                    _make(connection, self.path, partitions or PARTITIONS)
                (self.partitions,) = connection.execute(
                    "SELECT value FROM settings WHERE name = 'partitions'"
                ).fetchone()
            finally:
                connection.close()
        check_partitions(f"the bus {self.path}", self.partitions, partitions)

    def connect(self) -> sqlite3.Connection:
        """A connection, which several threads may use, one at a time."""
        connection = sqlite3.connect(
            self.path, timeout=0.0, isolation_level=None, check_same_thread=False
        )
        try:
            # Readers are not blocked by a writer, and a commit is one write at the end of a file.
            patiently(lambda: connection.execute("PRAGMA journal_mode=WAL"))
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Say of an error of the database what it means here."""
        try:
            yield
        except sqlite3.Error as error:
            raise _told(error, self.path) from error


def patiently(call: Callable[[], T]) -> T:
    """Call again until the file is not in use by somebody who lets nobody else in."""
    until, pause = time.monotonic() + _BUSY_SECONDS, 1e-4
    while True:
        try:
            return call()
        except sqlite3.OperationalError as error:
            busy = _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not busy or time.monotonic() > until:
                raise
        # SQLite's own pauses grow to a tenth of a second, in which a reader would fall behind.
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE)


@contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction that writes: all of it comes about, or nothing."""
    patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _make(connection: sqlite3.Connection, path: Path, partitions: int) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application == _APPLICATION:
        if version != SCHEMA_VERSION:
            raise SchemaVersionError(
                f"the bus {path} has schema version {version}, and this version of Esper knows"
                f" version {SCHEMA_VERSION}: it was made by a newer one. Update Esper here, or"
                " begin another bus."
            )
        return
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application or tables:
        raise InputError(f"{path} is a database, but no bus of Esper's: choose another file")
    for statement in _SCHEMA.split(";\n"):
        connection.execute(statement)
    connection.executemany(
        "INSERT INTO settings VALUES (?, ?)", [("partitions", partitions), ("changes", 0)]
    )
    connection.execute(f"PRAGMA application_id={_APPLICATION}")
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _told(error: sqlite3.Error, path: Path) -> Exception:
    code = _code(error)
    if code == sqlite3.SQLITE_NOTADB:
        return InputError(f"{path} is no database, and no bus: choose another file")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return ServiceUnavailableError(
            f"the bus {path} was in use for {_BUSY_SECONDS:g} s by another process that let nobody"
            " write: look for one that is stopped, and try again"
        )
    advice = {
        sqlite3.SQLITE_FULL: "the disk is full: make room and try again",
        sqlite3.SQLITE_READONLY: "it may not be written: give access",
        sqlite3.SQLITE_CANTOPEN: "give access to it and to its folder",
        sqlite3.SQLITE_IOERR: "look whether the disk is full or failing, and try again",
        sqlite3.SQLITE_CORRUPT: "it is damaged: move it away and begin another bus",
    }.get(code, "it cannot be used")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) and os.path.isdir(path):  # noqa: PTH112
        advice = "it is a folder: name a file in it"
    return BusError(f"the bus {path} does not work ({error}): {advice}")

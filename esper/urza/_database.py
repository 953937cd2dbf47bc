"""The database of a library: its tables, and how it is opened.

Several processes may open one at once that is not there yet, and one that can only be read can be
read.
"""

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool, QueuePool

from esper.errors import InputError

DATABASE = "library.sqlite"
_BUSY_SECONDS = 10.0

_METADATA = sa.MetaData()

KERNELS = sa.Table(
    "kernels",
    _METADATA,
    sa.Column("kernel_id", sa.String(64), primary_key=True),
    sa.Column("recipe", sa.String(64), nullable=False, index=True),
    sa.Column("blueprint", sa.String(64), nullable=False),
    sa.Column("signature", sa.String(200), nullable=False, index=True),
    sa.Column("birth", sa.String(8), nullable=False),
    sa.Column("confidence", sa.Float, nullable=False),
    sa.Column("init_seed", sa.Integer, nullable=False),
    sa.Column("parameter_count", sa.Integer, nullable=False),
    sa.Column("flops", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
)


MEASUREMENTS = sa.Table(
    "measurements",
    _METADATA,
    sa.Column("kernel_id", sa.String(64), primary_key=True),
    sa.Column("backend", sa.String(16), primary_key=True),
    sa.Column("device", sa.String(100), primary_key=True),
    sa.Column("batch", sa.Integer, primary_key=True),
    sa.Column("content", sa.JSON, nullable=False),
)
"""What was measured of kernels, which is not part of them: it differs by machine."""


def reason(error: Exception) -> str:
    """An error in one line, without what SQLAlchemy adds to it."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return str(cause).splitlines()[0]


def open_database(path: Path, *, create: bool) -> sa.Engine:
    """Open a library's database.

    Args:
        create: make it where it does not exist, to be written; else it may be one that can only
            be read.

    Raises:
        InputError: for a database that is none of a library.
        sqlite3.Error, SQLAlchemyError: where it cannot be opened.
    """
    frozen = False
    if not create:
        connection, frozen = _connect_to_read(path)
        connection.close()
    engine = sa.create_engine(
        "sqlite://",
        creator=(lambda: _connect(path, "rwc")) if create else (lambda: _connect_to_read(path)[0]),
        # What is kept open of a file that never changes would be wrong once it does.
        poolclass=NullPool if frozen else QueuePool,
    )
    try:
        with engine.connect() as connection:
            if create:
                _make(connection, path)
            _check(connection, path, _METADATA.tables)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}", uri=True, timeout=_BUSY_SECONDS, check_same_thread=False
    )
    try:
        # Opening reads nothing yet.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_to_read(path: Path) -> tuple[sqlite3.Connection, bool]:
    """A connection, and whether it takes the file for one that does not change."""
    try:
        return _connect(path, "rw"), False
    except sqlite3.OperationalError as error:
        # To read a database in WAL mode, SQLite makes files beside it. Where it may not, and no
        # process has left a log there, the file is all there is.
        refused = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        log = path.with_name(f"{path.name}-wal")
        if error.sqlite_errorcode & 0xFF not in refused or (log.exists() and log.stat().st_size):
            raise
    return _connect(path, "ro&immutable=1"), True


def _make(connection: sa.Connection, path: Path) -> None:
    ours = set(_METADATA.tables)
    there = _tables(connection)
    if ours <= there or there - ours:
        return
    _check(connection, path, there)
    # Of several processes that come to a new library at once, one makes the tables.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    _METADATA.create_all(connection)
    connection.commit()
    try:
        # Readers in other processes are not blocked by a writer.
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    except DBAPIError as error:
        # SQLite does not wait for this lock. Another process that makes the library has it.
        if getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
            raise


def _tables(connection: sa.Connection) -> set[str]:
    query = "SELECT name FROM sqlite_master WHERE type = 'table'"
    return {row[0] for row in connection.exec_driver_sql(query)}


def _check(connection: sa.Connection, path: Path, names: Iterable[str]) -> None:
    for table in (_METADATA.tables[name] for name in names):
        rows = connection.exec_driver_sql(f"PRAGMA table_info({table.name})")
        missing = {column.name for column in table.columns} - {row[1] for row in rows}
        if missing:
            raise InputError(
                f"{path} is no library of Esper's: its table {table.name} lacks"
                f" {', '.join(sorted(missing))}. Choose another folder."
            )

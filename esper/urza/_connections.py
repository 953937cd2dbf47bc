"""Connections to the two databases that a library may have, and what differs between them."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, QueuePool

from esper.errors import InputError

BUSY_SECONDS = 10.0
"""How long SQLite waits for another process that writes."""
_POOL = {"pool_size": 8, "max_overflow": 56, "pool_timeout": 30.0}
_CONNECT_SECONDS = 10
_WRITES = "esper_writes"


def parse_url(text: str) -> sa.URL:
    """The URL of a database, with the driver that Esper uses.

    Raises:
        InputError: for one that is none, or of a database that Esper does not use. What it says
            shows no password.
    """
    wanted = "expected sqlite:///FOLDER/library.sqlite or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        raise InputError(f"this is no URL of a database: {wanted}") from None
    kind = url.get_backend_name()
    if kind not in ("sqlite", "postgresql") or not url.database or url.database == ":memory:":
        shown = described(url)
        raise InputError(f"a library cannot be kept in the database {shown}: {wanted}")
    if kind == "sqlite":
        return url.set(drivername="sqlite")
    try:
        import psycopg
    except ImportError as error:
        raise InputError(
            "a library on PostgreSQL needs psycopg: pip install 'esper-morphogenetic[postgres]'"
        ) from error
    del psycopg
    return url.set(drivername="postgresql+psycopg")


def described(url: sa.URL) -> str:
    """Where a database is, for people: without a password."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return sa.URL.create(
        url.get_backend_name(), url.username, None, url.host, url.port, url.database
    ).render_as_string()


def connect_sqlite(path: Path, mode: str) -> sqlite3.Connection:
    """Open a file.

    Args:
        mode: as in SQLite's URIs: `rw`, `rwc`, `ro`.
    """
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        check_same_thread=False,
        # Transactions begin where `_begin` says so.
        isolation_level=None,
    )
    try:
        # Opening reads nothing yet.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_read(path: Path) -> tuple[sqlite3.Connection, bool]:
    """A connection, and whether it takes the file for one that does not change."""
    try:
        return connect_sqlite(path, "rw"), False
    except sqlite3.OperationalError as error:
        # To read a database in WAL mode, SQLite makes files beside it. Where it may not, and no
        # process has left a log there, the file is all there is.
        refused = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        log = path.with_name(f"{path.name}-wal")
        if error.sqlite_errorcode & 0xFF not in refused or (log.exists() and log.stat().st_size):
            raise
    return connect_sqlite(path, "ro&immutable=1"), True


def sqlite_engine(connect: Callable[[], sqlite3.Connection], *, keep: bool) -> sa.Engine:
    """An engine on SQLite.

    Args:
        keep: keep connections open between uses.
    """
    engine = sa.create_engine(
        "sqlite://",
        creator=connect,
        poolclass=QueuePool if keep else NullPool,
        **(_POOL if keep else {}),
    )
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: sa.Connection) -> None:
    # Two that read first and write then would refuse each other; one waits for the other instead.
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def postgres_engine(url: sa.URL) -> sa.Engine:
    """An engine on PostgreSQL, which survives the server's restart."""
    return sa.create_engine(
        url,
        pool_pre_ping=True,
        connect_args={"connect_timeout": _CONNECT_SECONDS, "application_name": "esper"},
        **_POOL,
    )


@contextmanager
def begun(engine: sa.Engine, *, write: bool) -> Iterator[sa.Connection]:
    """A transaction, which is committed where nothing is raised."""
    if write:
        engine = engine.execution_options(**{_WRITES: True})
    with engine.connect() as connection, connection.begin():
        yield connection


def is_sqlite(connection: sa.Connection) -> bool:
    """Whether it is to SQLite, and not to PostgreSQL."""
    return connection.dialect.name == "sqlite"


def database_clock(connection: sa.Connection) -> float:
    """The time on the machine that has the database, in seconds since 1970."""
    if is_sqlite(connection):
        return time.time()
    return float(connection.scalar(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))))  # pyright: ignore[reportArgumentType]


def lock(connection: sa.Connection, number: int) -> None:
    """Let no other transaction have a lock of that number until this one ends.

    On SQLite there is only one transaction that writes.
    """
    if not is_sqlite(connection):
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))


def upsert(connection: sa.Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """An insertion that may say what to do where the row is there already."""
    return sqlite.insert(table) if is_sqlite(connection) else postgresql.insert(table)

"""The database of a library: opened, checked, brought up to date, and asked.

Several processes may open one at once that is not there yet, and one that can only be read can be
read. One that an older Esper made is migrated in place before it is first written to.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from esper.errors import InputError, SchemaVersionError
from esper.urza._connections import (
    begun,
    connect_sqlite,
    connect_to_read,
    database_clock,
    described,
    is_sqlite,
    lock,
    parse_url,
    postgres_engine,
    sqlite_engine,
)
from esper.urza._schema import FIRST, METADATA, REVISIONS, VERSION_TABLE
from esper.urza._unmigrated import show_as_migrated

DATABASE = "library.sqlite"
Clock = Callable[[], float]
_SCHEMA_LOCK = 0x6573706572  # "esper"


class Database:
    """A database that was found to be a library's.

    Args:
        where: for messages; it shows no secret.
        clock: in seconds since 1970; by default that of the database's machine.
    """

    def __init__(
        self,
        engine: sa.Engine,
        where: str,
        *,
        clock: Clock | None = None,
        migrate: Callable[[], sa.Engine] | None = None,
    ) -> None:
        self.where = where
        self._engine = engine
        self._clock = clock
        self._migrate = migrate
        self._turn = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that reads."""
        with begun(self._engine, write=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that writes; it is committed where nothing is raised."""
        if self._migrate is not None:
            with self._turn:
                if self._migrate is not None:
                    old, self._engine = self._engine, self._migrate()
                    self._migrate = None
                    old.dispose()
        with begun(self._engine, write=True) as connection:
            yield connection

    def now(self, connection: sa.Connection) -> float:
        """The time, in seconds since 1970."""
        return database_clock(connection) if self._clock is None else self._clock()

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()


def open_folder(path: Path, *, create: bool, clock: Clock | None = None) -> Database:
    """Open a database on SQLite.

    Args:
        create: make it where it does not exist, to be written; else it may be one that can only
            be read.

    Raises:
        InputError: for a database that is none of a library, or of a newer Esper.
        sqlite3.Error, SQLAlchemyError: where it cannot be opened.
    """
    where = str(path)
    if create:
        engine = sqlite_engine(partial(connect_sqlite, path, "rwc"), keep=True)
        return Database(_checked(engine, where), where, clock=clock)
    connection, frozen = connect_to_read(path)
    connection.close()

    def reopened() -> sa.Engine:
        return _checked(sqlite_engine(partial(connect_sqlite, path, "rw"), keep=True), where)

    # What is kept open of a file that never changes would be wrong once it does.
    engine = sqlite_engine(lambda: connect_to_read(path)[0], keep=not frozen)
    try:
        with begun(engine, write=False) as opened:
            revision = _revision(opened, where)
        if revision is None:
            raise InputError(f"there is no library in {where}: its tables are not there")
        if revision == REVISIONS[-1]:
            return Database(engine, where, clock=clock)
    except BaseException:
        engine.dispose()
        raise
    engine.dispose()
    engine = sqlite_engine(lambda: show_as_migrated(connect_to_read(path)[0]), keep=False)
    return Database(engine, where, clock=clock, migrate=reopened)


def open_url(text: str, *, create: bool, clock: Clock | None = None) -> Database:
    """Open a database by its URL.

    Raises:
        InputError: as `open_folder`, and for a URL that is none.
        SQLAlchemyError: where it cannot be opened.
    """
    url = parse_url(text)
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database)).expanduser().absolute()
        if not create and not path.is_file():
            raise InputError(f"there is no library in {path}: the file is not there")
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_folder(path, create=create, clock=clock)
    where = described(url)
    engine = postgres_engine(url)
    if create:
        return Database(_checked(engine, where), where, clock=clock)
    try:
        with begun(engine, write=False) as connection:
            if _revision(connection, where) != REVISIONS[-1]:
                raise InputError(f"there is no library in {where}: its tables are not there")
    except BaseException:
        engine.dispose()
        raise
    return Database(engine, where, clock=clock)


def _checked(engine: sa.Engine, where: str) -> sa.Engine:
    """The engine, when its database has today's tables."""
    try:
        with begun(engine, write=False) as connection:
            revision = _revision(connection, where)
        if revision != REVISIONS[-1]:
            # Of several processes that come to it at once, one changes the schema.
            with begun(engine, write=True) as connection:
                lock(connection, _SCHEMA_LOCK)
                _bring_up_to_date(connection, _revision(connection, where))
        if revision is None and engine.dialect.name == "sqlite":
            _use_log(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _bring_up_to_date(connection: sa.Connection, revision: str | None) -> None:
    if revision == REVISIONS[-1]:
        return
    if revision is None:
        METADATA.create_all(connection)
        connection.exec_driver_sql(
            f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL,"
            f" CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
        )
        version = sa.table(VERSION_TABLE, sa.column("version_num"))
        connection.execute(sa.insert(version).values(version_num=REVISIONS[-1]))
        return
    from esper.urza._upgrade import upgrade

    unversioned = VERSION_TABLE not in _tables(connection)
    upgrade(connection, REVISIONS[-1], unversioned=unversioned)


def _use_log(engine: sa.Engine) -> None:
    """Have readers in other processes not be blocked by a writer."""
    raw = engine.raw_connection()
    try:
        raw.cursor().execute("PRAGMA journal_mode=WAL")
    except sqlite3.OperationalError as error:
        # SQLite does not wait for this lock. Another process that makes the library has it.
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
    finally:
        raw.close()


def _tables(connection: sa.Connection) -> set[str]:
    if is_sqlite(connection):
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    else:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
    return {row[0] for row in connection.exec_driver_sql(query)}


def _revision(connection: sa.Connection, where: str) -> str | None:
    """Of the schema that is there; None where there is nothing.

    Raises:
        InputError: where something else is there.
        SchemaVersionError: where it is newer than this version of Esper.
    """
    there = _tables(connection)
    if VERSION_TABLE in there:
        found = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalars()
        revision = next(iter(found), None)
        if revision not in REVISIONS:
            raise SchemaVersionError(
                f"the library {where} was written by a newer version of Esper: its schema is"
                f" {str(revision)[:32]!r}, and this version knows {REVISIONS[0]!r} to"
                f" {REVISIONS[-1]!r}. Update Esper, or use another library."
            )
        return revision
    if not there:
        return None
    # What was there before libraries had versions has the tables of the first, and no others.
    inspector = sa.inspect(connection)
    for table, columns in FIRST.items():
        names = inspector.get_columns(table) if table in there else []
        missing = set(columns) - {column["name"] for column in names}
        if missing:
            raise InputError(
                f"{where} is no library of Esper's: its table {table} lacks"
                f" {', '.join(sorted(missing))}. Choose another one."
            )
    return REVISIONS[0]

"""A library from before it had a version, as it is read while nobody may write to it.

Views, of the connection alone, give its tables the columns that they lack, so that what is asked of
today's tables is answered.
"""

import sqlite3

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from esper.urza._schema import FIRST, METADATA, VERSION_TABLE

_IS_VERSIONED = f"SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '{VERSION_TABLE}'"


def show_as_migrated(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Have a connection see today's tables; nothing is written to the file."""
    # Whoever has it open for writing may have migrated it since.
    if connection.execute(_IS_VERSIONED).fetchone() is not None:
        return connection
    connection.execute("PRAGMA temp_store = MEMORY")
    for table in METADATA.sorted_tables:
        there = FIRST.get(table.name, [])
        columns = ", ".join(_column(column, column.name in there) for column in table.columns)
        source = f" FROM main.{table.name}" if there else " WHERE 0"
        connection.execute(f"CREATE TEMP VIEW {table.name} AS SELECT {columns}{source}")
    return connection


def _column(column: sa.Column[object], there: bool) -> str:
    if there:
        return column.name
    default = column.server_default
    value = "NULL"
    if isinstance(default, sa.DefaultClause):
        quoted = isinstance(column.type, sa.String)
        value = f"'{default.arg}'" if quoted else str(default.arg)
    kind = column.type.compile(dialect=sqlite.dialect())
    return f"CAST({value} AS {kind}) AS {column.name}"

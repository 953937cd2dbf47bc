"""Searches, a page at a time: each page begins after the last row of the one before."""

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from esper.contracts import (
    CURRENT_KERNELS,
    BlueprintQuery,
    BlueprintRecord,
    KernelQuery,
    KernelRecord,
    KernelSignature,
    KernelState,
    Page,
)
from esper.urza._cursors import read_cursor, write_cursor
from esper.urza._database import Database
from esper.urza._failures import doing
from esper.urza._queue import MOST_DOCUMENT_BYTES, blueprint_record, document_bytes
from esper.urza._schema import BLUEPRINTS, KERNELS
from esper.urza._tags import BLUEPRINTS_TAGS, KERNELS_TAGS
from esper.urza._valid import valid

_BUFFERED = 16
"""Rows that a server sends at once."""
_K = KERNELS.c
_B = BLUEPRINTS.c
_FIELDS = KernelRecord.model_fields.keys() - {"schema_version", "tags", "state", "platforms"}

_ORDERS: dict[str, tuple[tuple[sa.Column[Any], ...], tuple[type, ...], bool]] = {
    "name": ((_K.blueprint, _K.init_seed, _K.kernel_id), (str, int, str), False),
    "created": ((_K.created, _K.kernel_id), (float, str), True),
    "flops": ((_K.flops, _K.kernel_id), (int, str), False),
    "parameters": ((_K.parameter_count, _K.kernel_id), (int, str), False),
    "gain": ((_K.gain, _K.kernel_id), (float, str), True),
}
"""The columns that order, the types of their values, and whether the greatest comes first."""


def platforms_text(platforms: Sequence[str] | None) -> str | None:
    """Platforms as the column has them."""
    return None if platforms is None else "".join(f",{p}" for p in platforms) + ","


def kernel_record(row: Any, tags: dict[str, tuple[str, ...]]) -> KernelRecord:
    """What is known of a kernel, from its row."""
    platforms = row["platforms"]
    return valid(
        KernelRecord,
        **{name: row[name] for name in _FIELDS},
        state=KernelState(row["state"]),
        platforms=None if platforms is None else tuple(p for p in platforms.split(",") if p),
        tags=tags.get(row["kernel_id"], ()),
    )


class Search:
    """Finds kernels and blueprints in a database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._what = f"the library {database.where} cannot be searched"

    def find(
        self,
        signature: KernelSignature | None,
        blueprint: str | None,
        recipe: str | None,
        states: Iterable[KernelState],
    ) -> list[KernelRecord]:
        """See `KernelLibrary.find`."""
        query = sa.select(KERNELS).where(_K.state.in_([state.value for state in states]))
        if signature is not None:
            query = query.where(_K.signature == str(signature))
        if blueprint is not None:
            query = query.where(_K.blueprint == blueprint)
        if recipe is not None:
            query = query.where(_K.recipe == recipe)
        query = query.order_by(_K.blueprint, _K.init_seed, _K.kernel_id)
        with doing(self._what), self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
            tags = KERNELS_TAGS.of(connection, [row["kernel_id"] for row in rows])
        return [kernel_record(row, tags) for row in rows]

    def kernels(self, query: KernelQuery) -> Page[KernelRecord]:
        """See `KernelLibrary.search`."""
        columns, types, falling = _ORDERS[query.order]
        selection = sa.select(KERNELS).where(*_kernel_conditions(query))
        after = read_cursor(query, types)
        if after is not None:
            selection = selection.where(_after(columns, after, falling=falling))
        for column in columns:
            order = column.desc() if falling else column.asc()
            selection = selection.order_by(order.nulls_last() if column.nullable else order)
        with doing(self._what), self._database.reading() as connection:
            rows = connection.execute(selection.limit(query.limit + 1)).mappings().all()
            more, rows = len(rows) > query.limit, rows[: query.limit]
            tags = KERNELS_TAGS.of(connection, [row["kernel_id"] for row in rows])
        items = tuple(kernel_record(row, tags) for row in rows)
        end = [rows[-1][column.name] for column in columns] if more else None
        return Page[KernelRecord](
            items=items, next_cursor=None if end is None else write_cursor(query, end)
        )

    def blueprints(self, query: BlueprintQuery) -> Page[BlueprintRecord]:
        """See `KernelLibrary.blueprints`."""
        selection = sa.select(BLUEPRINTS)
        if query.states is not None:
            selection = selection.where(_B.state.in_([state.value for state in query.states]))
        if query.name is not None:
            selection = selection.where(_B.name == query.name)
        if query.signature is not None:
            selection = selection.where(_B.signature == str(query.signature))
        selection = selection.where(*BLUEPRINTS_TAGS.has_all(_B.blueprint_id, query.tags))
        columns = (_B.created, _B.blueprint_id)
        after = read_cursor(query, (float, str))
        if after is not None:
            selection = selection.where(_after(columns, after, falling=False))
        selection = selection.order_by(*columns).limit(query.limit + 1)
        # A server gives them a few at a time too, and not all before the first is looked at.
        selection = selection.execution_options(stream_results=True, max_row_buffer=_BUFFERED)
        with doing(self._what), self._database.reading() as connection:
            selection = selection.add_columns(document_bytes(connection))
            with connection.execute(selection) as found:
                rows, more = _page_of(found.mappings(), query.limit)
            tags = BLUEPRINTS_TAGS.of(connection, [row["blueprint_id"] for row in rows])
        items = tuple(blueprint_record(row, tags) for row in rows)
        end = [rows[-1][column.name] for column in columns] if more else None
        return Page[BlueprintRecord](
            items=items, next_cursor=None if end is None else write_cursor(query, end)
        )


def _page_of(found: Iterable[Any], limit: int) -> tuple[list[Any], bool]:
    """The rows of blueprints that one page holds, and whether others come after them."""
    rows: list[Any] = []
    room = MOST_DOCUMENT_BYTES
    for row in found:
        room -= row["document_bytes"]
        if len(rows) == limit or (rows and room < 0):
            return rows, True
        rows.append(row)
    return rows, False


def _kernel_conditions(query: KernelQuery) -> list[sa.ColumnElement[bool]]:
    states = CURRENT_KERNELS if query.states is None else query.states
    found: list[sa.ColumnElement[bool]] = [_K.state.in_([state.value for state in states])]
    equal = {
        _K.signature: None if query.signature is None else str(query.signature),
        _K.blueprint: query.blueprint,
        _K.recipe: query.recipe,
        _K.ancestor: query.ancestor,
    }
    found += [column == value for column, value in equal.items() if value is not None]
    most = {
        _K.parameter_count: query.max_parameters,
        _K.flops: query.max_flops,
        _K.size_bytes: query.max_bytes,
    }
    found += [column <= value for column, value in most.items() if value is not None]
    if query.min_gain is not None:
        found.append(_K.gain >= query.min_gain)
    if query.platform is not None:
        # LIKE does not tell capitals from small letters on SQLite.
        name = f",{query.platform},"
        found.append(sa.func.replace(_K.platforms, name, "") != _K.platforms)
    return found + KERNELS_TAGS.has_all(_K.kernel_id, query.tags)


def _after(
    columns: tuple[sa.Column[Any], ...], values: list[Any], *, falling: bool
) -> sa.ColumnElement[bool]:
    """That a row comes after the one with these values; those without the first come last."""
    first, rest = columns[0], sa.tuple_(*columns[1:])
    if values[0] is None:
        end = sa.tuple_(*values[1:])
        return sa.and_(first.is_(None), rest < end if falling else rest > end)
    row, end = sa.tuple_(*columns), sa.tuple_(*values)
    beyond = row < end if falling else row > end
    return sa.or_(beyond, first.is_(None)) if first.nullable else beyond

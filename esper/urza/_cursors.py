"""Where a page of results ends, as a text that only the library reads."""

import base64
import hashlib
import json
import math
from typing import Any

from esper.contracts import LARGEST_COUNT, BlueprintQuery, KernelQuery
from esper.errors import InputError

_Query = KernelQuery | BlueprintQuery


def write_cursor(query: _Query, values: list[Any]) -> str:
    """The cursor after a row, which has these values in the columns that order the results."""
    data = json.dumps([_fingerprint(query), *values], separators=(",", ":"))
    return base64.urlsafe_b64encode(data.encode()).decode().rstrip("=")


def read_cursor(query: _Query, types: tuple[type, ...]) -> list[Any] | None:
    """The values of the row after which to go on; None for the first page.

    Args:
        types: of the values; a float may be None.

    Raises:
        InputError: for a cursor of another query, or a text that is none.
    """
    if query.cursor is None:
        return None
    again = "ask without a cursor for the first page"
    try:
        padded = query.cursor + "=" * (-len(query.cursor) % 4)
        found = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise InputError(f"this is no cursor of a library's: {query.cursor[:40]!r}; {again}")
    if found[0] != _fingerprint(query):
        raise InputError(f"the cursor is that of another query; {again}")
    values = found[1:]
    fits = len(values) == len(types) and all(
        (type(value) is kind and _is_storable(value)) or (kind is float and value is None)
        for value, kind in zip(values, types, strict=True)
    )
    if not fits:
        raise InputError(f"this is no cursor of a library's: {query.cursor[:40]!r}; {again}")
    return values


def _is_storable(value: Any) -> bool:
    """Whether every database takes a value, as it does all that a cursor is made of."""
    if isinstance(value, str):
        # Half a character has no UTF-8.
        return "\0" not in value and value == value.encode("utf-8", "replace").decode()
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST_COUNT


def _fingerprint(query: _Query) -> str:
    text = query.model_dump_json(exclude={"cursor", "limit"})
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Fields that all records of a context have."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

_EMPTY: Mapping[str, Any] = MappingProxyType({})
_BOUND: ContextVar[Mapping[str, Any]] = ContextVar("esper_log_fields", default=_EMPTY)


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Give every record of this block these fields, in this thread or task and those it begins.

    A task of asyncio takes them along; a thread only if it is begun in a copy of the context.
    """
    token = _BOUND.set({**_BOUND.get(), **fields})
    try:
        yield
    finally:
        _BOUND.reset(token)


def bound_fields() -> Mapping[str, Any]:
    """The fields that a record has here."""
    return _BOUND.get()

"""Results of a search, a page at a time."""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field

from esper.contracts._data import Data
from esper.contracts._kernels import MOST_RESULTS, Cursor

T = TypeVar("T", bound=Data)


class Page(Data, Generic[T]):
    """Some of what was found, and from where the rest can be asked for."""

    schema_version: Literal[1] = 1
    items: Annotated[tuple[T, ...], Field(max_length=MOST_RESULTS)]
    next_cursor: Cursor | None = None
    """None where there is no more."""

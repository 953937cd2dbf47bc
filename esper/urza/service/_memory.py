"""Answers that were given before, as long as the database has not changed since.

SQLite tells at the cost of a few microseconds whether anybody has committed anything. What was read
after it told a number is what is there for as long as it tells the same number: so an answer from
memory is never older than the question.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cachetools import LRUCache
from starlette.responses import Response

Changes = Callable[[], int | None]
"""A number that is another one when anything has changed; None where that is not known now."""

Asked = tuple[str, bytes]
"""Path and parameters."""

_BYTES = 32 << 20
_LARGEST = 1 << 20


def sqlite_changes(path: Path) -> Changes:
    """What tells of changes of a SQLite database, by whatever process.

    It is asked in one thread, always the same.
    """
    connection: sqlite3.Connection | None = None

    def changes() -> int | None:
        nonlocal connection
        try:
            if connection is None:
                # It never waits: whoever asks has something else to do.
                connection = sqlite3.connect(
                    f"{path.absolute().as_uri()}?mode=rw",
                    uri=True,
                    timeout=0.0,
                    isolation_level=None,
                )
            return connection.execute("PRAGMA data_version").fetchone()[0]
        except sqlite3.Error:
            return None

    return changes


class _Given(NamedTuple):
    changes: int
    response: Response


class Memory:
    """Answers by what was asked for.

    Args:
        changes: tells whether the database is as it was; None where nothing tells that, and
            nothing is remembered.
    """

    def __init__(self, changes: Changes | None) -> None:
        self.changes: Changes = changes or (lambda: None)
        self._given: LRUCache[Asked, _Given] = LRUCache(
            _BYTES, lambda given: 1000 + len(given.response.body)
        )

    def recall(self, asked: Asked, changes: int | None) -> Response | None:
        """The answer, where there is one and it still holds."""
        given = None if changes is None else self._given.get(asked)
        return given.response if given is not None and given.changes == changes else None

    def note(self, asked: Asked, changes: int | None, response: Response) -> None:
        """An answer was given to what was asked after `changes` was told."""
        if changes is not None and response.status_code == 200 and len(response.body) <= _LARGEST:
            self._given[asked] = _Given(changes, response)

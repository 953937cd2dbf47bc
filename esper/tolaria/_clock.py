"""Where the time of a run went."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Wall time by activity, for the report alone."""

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        self.spent: dict[str, float] = dict(spent or {})

    @contextmanager
    def charge(self, activity: str) -> Iterator[None]:
        """Charge the time of a block to an activity."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            self.spent[activity] = self.spent.get(activity, 0.0) + elapsed

"""How many programs XLA compiles: jax's own event, counted."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVENT = "/jax/core/compile/backend_compile_duration"


class _Counter:
    """Listens from its first use on; taking listeners away again is not safe among threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listens = False
        self.count = 0

    def listen(self) -> None:
        import jax

        with self._lock:
            if not self._listens:
                jax.monitoring.register_event_duration_secs_listener(self._heard)
                self._listens = True

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _EVENT:
            with self._lock:
                self.count += 1


_COUNTER = _Counter()


@contextmanager
def count_compilations() -> Iterator[Callable[[], int]]:
    """Count the programs that XLA compiles inside a `with` block, by whomever.

    Yields a function that returns the count so far; after the block it returns the
    block's total. All threads of the process are counted, and so is everything jax
    compiles for itself: an operation outside of `jax.jit` is a program too, on its
    first use. A program that comes from jax's persistent cache counts as well.

    Example:
        >>> with count_compilations() as count:
        ...     for step in range(100):
        ...         params = train_step(params)
        >>> assert count() <= 1

    The count rests on `jax.monitoring`, and stays 0 after a call of its
    `clear_event_listeners`.
    """
    _COUNTER.listen()
    before = _COUNTER.count
    total: int | None = None

    def count() -> int:
        return _COUNTER.count - before if total is None else total

    try:
        yield count
    finally:
        total = _COUNTER.count - before

"""How often one token may ask: a bucket that fills evenly, of which each request takes one."""

import threading
import time
from collections.abc import Callable


class Rate:
    """Buckets by name; one that nobody knows yet is full.

    Args:
        rate: requests a second.
        burst: what a bucket holds.
        clock: gives seconds, of which only differences are read.
    """

    def __init__(
        self, rate: float, burst: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = max(1.0, burst)
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> float:
        """Take one: seconds to wait until there is one, 0 where it was taken."""
        now = self._clock()
        with self._lock:
            level, at = self._buckets.get(name, (self._burst, now))
            level = min(self._burst, level + max(0.0, now - at) * self._rate)
            taken = level >= 1.0
            self._buckets[name] = (level - 1.0 if taken else level, now)
        return 0.0 if taken else (1.0 - level) / self._rate

"""Times that were measured, of which the last ones are kept."""

import threading
from collections import deque


class Latencies:
    """Counts all, and keeps the last `capacity` of them. Threads may share one."""

    def __init__(self, capacity: int = 1024) -> None:
        self._lock = threading.Lock()
        self._last: deque[float] = deque(maxlen=capacity)
        self._count = 0

    def add(self, seconds: float) -> None:
        """Take a measurement."""
        with self._lock:
            self._last.append(seconds)
            self._count += 1

    def stats(self, unit: str, per_second: float) -> dict[str, float]:
        """How many there were, and mean, median, 95th percentile and last of those kept.

        Args:
            unit: the suffix of the keys.
            per_second: how many of the unit a second has.
        """
        with self._lock:
            count, kept = self._count, list(self._last)
        last = kept[-1] if kept else 0.0
        kept.sort()
        found = {
            "mean": sum(kept) / len(kept) if kept else 0.0,
            "p50": quantile(kept, 0.5),
            "p95": quantile(kept, 0.95),
            "last": last,
        }
        return {"count": count} | {f"{k}_{unit}": v * per_second for k, v in found.items()}


def quantile(ordered: list[float], share: float) -> float:
    """Of sorted values, between two of them by their distance; 0 where there are none."""
    if not ordered:
        return 0.0
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])

"""How long the turns of a loop take."""

import numpy as np


class Ticks:
    """The durations of the last turns, and when the next one is due.

    Args:
        seconds: between the beginnings of two turns.
        window: turns that quantiles are of.
    """

    def __init__(self, seconds: float, window: int = 2_048) -> None:
        self.seconds = seconds
        self.count = 0
        self.late = 0
        """Turns that began so late that another one was left out."""
        self.slowest = 0.0
        self.total = 0.0
        """Seconds of all turns."""
        self._last = np.zeros(window)
        self._due = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether a turn is to begin."""
        return now >= self._due

    def wait(self, now: float) -> float:
        """Seconds until one is."""
        return max(0.0, self._due - now)

    def begin(self, now: float) -> None:
        """One begins; what was missed is not made up for."""
        late = now >= self._due + self.seconds
        self.late += late and self._due > float("-inf")
        self._due = now + self.seconds if late else self._due + self.seconds

    def end(self, seconds: float) -> None:
        """It took so long."""
        self._last[self.count % len(self._last)] = seconds
        self.count += 1
        self.total += seconds
        self.slowest = max(self.slowest, seconds)

    def quantile(self, q: float) -> float:
        """Of the last turns' durations, in seconds; 0 before the first."""
        known = self._last[: min(self.count, len(self._last))]
        return float(np.quantile(known, q)) if len(known) else 0.0

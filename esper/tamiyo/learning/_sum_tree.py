"""Numbers of which one is drawn in proportion to its size, in logarithmic time."""

import numpy as np


class SumTree:
    """Numbers from 0, with the sum of each pair, of each pair of pairs, and so on.

    Every sum is that of its two parts, added in the one order: the tree follows from the numbers
    to the last bit, in whatever order they were set.
    """

    def __init__(self, count: int) -> None:
        """Begin with 0 everywhere."""
        self._leaves = 1 << max(0, count - 1).bit_length()
        # The parts of sum i are at 2 i and 2 i + 1; the whole is at 1.
        self._sums = np.zeros(2 * self._leaves)
        self._count = count

    @property
    def values(self) -> np.ndarray:
        """The numbers, f64 `[count]`; not to be written to."""
        return self._sums[self._leaves : self._leaves + self._count]

    @property
    def total(self) -> float:
        """Of all numbers."""
        return float(self._sums[1])

    def set(self, places: np.ndarray, values: np.ndarray | float) -> None:
        """Set the numbers at `places`; of a place that is named twice, the last counts."""
        rows = np.asarray(places, np.int64) + self._leaves
        self._sums[rows] = values
        while len(rows) and rows[0] > 1:
            rows = np.unique(rows // 2)
            self._sums[rows] = self._sums[2 * rows] + self._sums[2 * rows + 1]

    def find(self, masses: np.ndarray) -> np.ndarray:
        """At which place the sum of all numbers up to it first exceeds each of `masses`.

        Never at a number of 0, as long as there is another.
        """
        rows = np.ones(len(masses), np.int64)
        left = np.asarray(masses, np.float64).copy()
        while rows.size and rows[0] < self._leaves:
            first, second = self._sums[2 * rows], self._sums[2 * rows + 1]
            # Rounding may leave more than there is.
            onwards = (left >= first) & (second > 0)
            left = np.where(onwards, left - first, left)
            rows = 2 * rows + onwards
        return rows - self._leaves

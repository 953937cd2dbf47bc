"""How far two computations of one thing may differ: one table, by dtype.

A comparison holds when max|a − b| ≤ absolute + relative · max|b|. Measured
against the largest value, not element by element, because sums of many terms
are accurate relative to their scale. Infinities equal themselves, give no
scale, and differ infinitely from everything else.
"""

from typing import Any, NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """Bounds of the difference of two arrays of one dtype."""

    absolute: float
    relative: float


TOLERANCES: dict[str, Tolerance] = {
    "float64": Tolerance(1e-12, 1e-12),
    "float32": Tolerance(1e-6, 1e-5),
    "float16": Tolerance(1e-3, 5e-3),
    "bfloat16": Tolerance(1e-2, 4e-2),
}


class Difference(NamedTuple):
    """How far two arrays lie apart, and how far they may."""

    largest: float
    allowed: float

    @property
    def within(self) -> bool:
        """False, too, where a difference is not a number."""
        return self.largest <= self.allowed


def difference(actual: Any, expected: Any, dtype: str | None = None) -> Difference:
    """Compare two arrays of one shape by the table.

    Args:
        dtype: the row of the table; by default that of `expected`.

    Raises:
        ValueError: for arrays of different shapes.
    """
    a, b = np.asarray(actual), np.asarray(expected)
    if a.shape != b.shape:
        raise ValueError(f"cannot compare shapes {a.shape} and {b.shape}")
    bounds = TOLERANCES[dtype or b.dtype.name]
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinities, which the next line gives their gap
        gaps = np.where(a == b, 0.0, np.abs(a - b))
    scale = np.max(np.abs(b), initial=0.0, where=np.isfinite(b))
    return Difference(
        float(np.max(gaps, initial=0.0)), bounds.absolute + bounds.relative * float(scale)
    )

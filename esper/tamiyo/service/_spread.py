"""What is usual for a model's health, and what is far from it."""

import numpy as np

from esper.errors import InputError

_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""

LEAST_SCALE = 0.01
"""Of the scale: where most scores are equal, what differs by a hair is not anomalous."""

LEAST_COUNT = 32
"""Scores before which nothing is said to be anomalous."""


class RunningSpread:
    """The median and the median absolute deviation (MAD) of the last scores of one model.

    A score x is anomalous where its robust z-score, |x - median| / (1.4826 · MAD), is above a
    threshold; 3.5 is what Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993)
    recommend. Unlike mean and standard deviation, both bear that almost half of the scores are
    outliers. A batch is judged by what came before it, and counts from then on.

    Args:
        window: scores that count, from 32.
        threshold: of the z-score, above 0.

    Raises:
        InputError: for values out of range.
    """

    def __init__(self, window: int = 512, threshold: float = 3.5) -> None:
        if window < LEAST_COUNT or not threshold > 0.0:
            raise InputError(
                f"a running spread takes a window of at least {LEAST_COUNT} scores and a threshold"
                f" above 0, got {window!r} and {threshold!r}"
            )
        self._scores = np.zeros(window)
        self._count = 0
        self._threshold = threshold

    def z_scores(self, scores: np.ndarray) -> np.ndarray:
        """Robust z-scores `[n]` by what was taken so far; 0 before enough was."""
        known = self._scores[: min(self._count, len(self._scores))]
        if len(known) < LEAST_COUNT:
            return np.zeros(len(scores))
        middle = np.median(known)
        scale = max(_TO_SIGMA * float(np.median(np.abs(known - middle))), LEAST_SCALE)
        return np.abs(scores - middle) / scale

    def judge(self, scores: np.ndarray) -> np.ndarray:
        """Which of a batch's scores, finite ones `[n]`, are anomalous; takes them in."""
        found = self.z_scores(scores) > self._threshold
        window = len(self._scores)
        last = scores[-window:]
        first = self._count + len(scores) - len(last)
        self._scores[(first + np.arange(len(last))) % window] = last
        self._count += len(scores)
        return found

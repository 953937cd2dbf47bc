"""How far the mean of paired differences may be trusted."""

import math
import warnings
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 9_999
_SEED = 1_987
"""Of the bootstrap's generator: equal samples have equal intervals."""


class Interval(NamedTuple):
    """An interval for a mean; numbers, or arrays where it is of several samples."""

    low: np.ndarray
    high: np.ndarray


def widened(level: float, count: int) -> float:
    """The level to ask a bootstrap for, so that it covers with `level` at `count` values.

    A bootstrap draws from a sample whose variance is (n-1)/n of what it should be, and knows
    nothing of Student's t. The quantile is therefore taken at √(n/(n-1))·t, after Hesterberg
    (2015), "What Teachers Should Know About the Bootstrap", The American Statistician 69(4).

    Args:
        level: in (0, 1).
        count: values in the sample, at least 2.
    """
    quantile = stats.t.ppf(0.5 + level / 2.0, count - 1)
    return float(1.0 - 2.0 * stats.norm.sf(math.sqrt(count / (count - 1)) * quantile))


def bootstrap_interval(sample: np.ndarray, level: float, *, resamples: int = RESAMPLES) -> Interval:
    """The BCa bootstrap interval of the mean over the last axis, at a widened level.

    Bias-corrected and accelerated: Efron (1987), "Better Bootstrap Confidence Intervals", JASA
    82. It departs from that in `widened`: without it, an interval of 95 % over eight normal
    values covers 88 % of the time. Where all values are the same BCa is not defined (0/0), and
    the interval is that one value.

    Args:
        sample: `[..., n]`, n at least 2; multiples of one number, so that ties are exact.
        level: in (0, 1).
        resamples: bootstrap samples, of one generator with a fixed seed.
    """
    count = sample.shape[-1]
    if count < 2:
        raise ValueError(f"an interval takes at least 2 values, got {count}; make more runs")
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (sample,),
            np.mean,
            n_resamples=resamples,
            axis=-1,
            vectorized=True,
            confidence_level=widened(level, count),
            method="BCa",
            rng=np.random.default_rng(_SEED),
        ).confidence_interval
    same = np.ptp(sample, axis=-1) == 0.0
    value = sample[..., 0]
    return Interval(np.where(same, value, found.low), np.where(same, value, found.high))

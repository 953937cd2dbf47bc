"""Whether what is said to have a probability comes true as often."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize

from esper.errors import InputError

BINS = 10


class Reliability(NamedTuple):
    """A reliability curve: what was said against what came true, in bins of equal width."""

    said: np.ndarray
    """f64 `[bins]`: mean probability; NaN where nothing was said."""
    true: np.ndarray
    """f64 `[bins]`: how often it came true."""
    counts: np.ndarray
    """i64 `[bins]`."""
    ece: float
    """Expected calibration error (Naeini et al., 2015): the gaps' mean, by count, in [0, 1]."""


def reliability(
    probabilities: Float[np.ndarray, " n"], true: Bool[np.ndarray, " n"], bins: int = BINS
) -> Reliability:
    """How well probabilities agree with what came true.

    Raises:
        InputError: for no prediction, for two lengths, or a probability outside of [0, 1].
    """
    if len(probabilities) != len(true) or not len(true):
        raise InputError(
            "calibration takes as many outcomes as probabilities, at least one: got"
            f" {len(true)} and {len(probabilities)}"
        )
    p, y = np.asarray(probabilities, np.float64), np.asarray(true, np.float64)
    if not ((p >= 0.0) & (p <= 1.0)).all():
        raise InputError(f"probabilities are in [0, 1], got {p[~((p >= 0) & (p <= 1))][0]}")
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.maximum(count, 1)
    said = np.where(count, np.bincount(place, p, bins) / some, np.nan)
    came = np.where(count, np.bincount(place, y, bins) / some, np.nan)
    gaps = np.where(count, np.abs(said - came), 0.0)
    return Reliability(said, came, count, float((gaps * count).sum() / len(p)))


def platt(
    probabilities: Float[np.ndarray, " n"], true: Bool[np.ndarray, " n"]
) -> tuple[float, float]:
    """Slope and shift of the logits by which probabilities come true as often as they say.

    The maximum of the likelihood (Platt, 1999), on data that nothing else was learned from.
    """
    p = np.clip(np.asarray(probabilities, np.float64), 1e-4, 1.0 - 1e-4)
    logits, y = np.log(p) - np.log1p(-p), np.asarray(true, np.float64)

    def loss(found: np.ndarray) -> float:
        z = found[0] * logits + found[1]
        return float(np.mean(np.logaddexp(0.0, z) - y * z))

    best = minimize(loss, np.array([1.0, 0.0]), method="Nelder-Mead")
    return float(best.x[0]), float(best.x[1])

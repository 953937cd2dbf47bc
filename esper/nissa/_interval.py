"""How far a mean over few runs may be trusted."""

import math

import numpy as np
from scipy.special import stdtrit


def half_width(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % t-interval of the mean over the first axis; 0 for one value."""
    count = len(values)
    if count < 2:
        return np.zeros(values.shape[1:])
    return stdtrit(count - 1, 0.975) * values.std(axis=0, ddof=1) / math.sqrt(count)

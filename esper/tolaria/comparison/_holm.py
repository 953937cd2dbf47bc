"""One family of tests."""

import numpy as np


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values over the last axis, corrected for being several.

    The i-th smallest of k is multiplied by k - i (from 0), made no smaller than those before it
    and at most 1. Rejecting what is at most alpha makes a false claim with a probability of at
    most alpha, whatever depends on what: Holm (1979), "A Simple Sequentially Rejective Multiple
    Test Procedure", Scand. J. Statist. 6.
    """
    order = np.argsort(p_values, axis=-1, kind="stable")
    ranked = np.take_along_axis(p_values, order, axis=-1)
    factors = np.arange(p_values.shape[-1], 0, -1)
    stepped = np.minimum(np.maximum.accumulate(ranked * factors, axis=-1), 1.0)
    corrected = np.empty_like(stepped)
    np.put_along_axis(corrected, order, stepped, axis=-1)
    return corrected

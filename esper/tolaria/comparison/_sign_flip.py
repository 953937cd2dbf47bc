"""Exact tests of paired differences, by flipping their signs."""

from typing import Literal

import numpy as np
from scipy import stats

DRAWS = 99_999
"""Beyond this many sign patterns, which is beyond 16 pairs, so many are drawn."""

_SEED = 2_010


def sign_flip_p(
    sample: np.ndarray, alternative: Literal["two-sided", "greater", "less"] = "two-sided"
) -> np.ndarray:
    """The p-value of the sign-flip permutation test of the mean, over the last axis.

    Under the null hypothesis that a difference is as likely to be d as -d, all 2^n patterns of
    signs are equally likely: p is the part of them whose mean is at least as extreme. Where
    there are more than `DRAWS`, that many are drawn, and p is (b + 1)/(m + 1) with b of m drawn
    at least as extreme, which is never 0 and keeps the test's level: Phipson and Smyth (2010),
    "Permutation P-values Should Never Be Zero", Stat. Appl. Genet. Mol. Biol. 9(1).

    Args:
        sample: `[..., n]` differences; multiples of one number, so that ties are exact.
        alternative: which mean is extreme.
    """
    found = stats.permutation_test(
        (sample,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=DRAWS,
        batch=1_000,
        alternative=alternative,
        axis=-1,
        rng=np.random.default_rng(_SEED),
    )
    return np.asarray(found.pvalue)


def fewest_pairs(level: float) -> int:
    """The fewest pairs with which the two-sided test can reach a level: 2/2^n ≤ level."""
    count = 2
    while 2.0 / 2.0**count > level:
        count += 1
    return count

"""Treatment minus control, seed by seed, and what can be said of it."""

import math
from collections.abc import Sequence

import numpy as np

from esper.tolaria.comparison._design import Design
from esper.tolaria.comparison._interval import bootstrap_interval
from esper.tolaria.comparison._pair import Pair
from esper.tolaria.comparison._power import minimal_effect, paired_power, pairs_needed
from esper.tolaria.comparison._sign_flip import fewest_pairs, sign_flip_p

_BITS = 40
"""Differences are told apart down to 2^-40 of the greatest value, about 1e-12 of it."""


def on_a_grid(values: np.ndarray, scale: float) -> np.ndarray:
    """Values as multiples of a power of two, about 1e-12 of `scale`.

    0.7 - 0.6 and 0.9 - 0.8 are not the same number to a computer; on the grid they are, and all
    sums of them are exact, so that ties stay ties whatever the order and the arms' offset.
    """
    if not scale > 0.0:
        return np.zeros_like(values)
    grid = 2.0 ** (math.ceil(math.log2(scale)) - _BITS)
    return np.rint(values / grid) * grid


def compare_pair(
    design: Design, control: str, treated: Sequence[float], untreated: Sequence[float]
) -> Pair:
    """A treatment beside one control; p-values are not yet corrected, and it has no word.

    Equivalence is tested by two one-sided tests, after Schuirmann (1987), "A Comparison of the Two
    One-Sided Tests Procedure and the Power Approach for Assessing the Equivalence of Average
    Bioavailability", J. Pharmacokinet. Biopharm. 15: sign-flip tests here, of differences moved by
    the smallest effect of interest either way.

    Args:
        control: which one.
        treated: the metric of the treatment, by seed, at least 3 of them.
        untreated: the metric of the control, by the same seeds.
    """
    ours, theirs = np.asarray(treated, np.float64), np.asarray(untreated, np.float64)
    scale = float(np.abs([ours, theirs]).max())
    sample = on_a_grid(ours - theirs, scale)
    # Far effects are on the same grid, so that a difference that equals them is a tie.
    margin = float(on_a_grid(np.array(design.smallest_effect), max(scale, design.smallest_effect)))
    count = len(sample)
    mean, spread = float(sample.mean()), float(sample.std(ddof=1))
    low, high = bootstrap_interval(sample, 1.0 - design.alpha)
    inner_low, inner_high = bootstrap_interval(sample, 1.0 - 2.0 * design.alpha)
    p_equivalent = max(
        float(sign_flip_p(sample + margin, "greater")), float(sign_flip_p(sample - margin, "less"))
    )
    ahead = design.direction * sample
    return Pair(
        control=control,
        differences=tuple(float(value) for value in ours - theirs),
        mean=mean,
        median=float(np.median(sample)),
        spread=spread,
        low=float(low),
        high=float(high),
        inner_low=float(inner_low),
        inner_high=float(inner_high),
        p=float(sign_flip_p(sample)),
        p_equivalent=p_equivalent,
        d_z=mean / spread if spread > 0.0 else None,
        superiority=float(np.mean((ahead > 0.0) + 0.5 * (ahead == 0.0))),
        power=paired_power(design.smallest_effect, spread, count, design.level),
        minimal_effect=minimal_effect(spread, count, design.level),
        seeds_needed=pairs_needed(
            design.smallest_effect, spread, design.level, fewest_pairs(design.level)
        ),
    )

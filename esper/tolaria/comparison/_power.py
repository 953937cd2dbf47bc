"""What a number of seeds can find.

After Colas, Sigaud and Oudeyer (2018), "How Many Random Seeds? Statistical Power Analysis in
Deep Reinforcement Learning Experiments", and (2019), "A Hitchhiker's Guide to Statistical
Comparisons of Reinforcement Learning Algorithms": too few seeds find little, and what they find
is exaggerated.
"""

import math

from scipy import optimize, stats

WANTED_POWER = 0.8
MOST_PAIRS = 100_000

_NORMAL_BEYOND = 1_000
"""Pairs; scipy's noncentral t does not converge everywhere beyond."""


def paired_power(effect: float, spread: float, count: int, level: float) -> float:
    """The probability that the two-sided paired t-test finds an effect.

    P(|T| > t) with T noncentral t of n - 1 degrees of freedom and noncentrality √n·effect/spread,
    t the central quantile at 1 - level/2; beyond a thousand pairs both are taken as normal. For
    normal differences it is exact; the sign-flip test, by which pairs are judged, is near it.

    Args:
        effect: the true mean of the differences.
        spread: their standard deviation; with 0 every effect that is not 0 is found.
        count: pairs, at least 3.
        level: of the test, in [1e-6, 1).
    """
    if spread == 0.0:
        return 1.0 if effect else level
    shift = math.sqrt(count) * abs(effect) / spread
    if count > _NORMAL_BEYOND:
        bound = float(stats.norm.isf(level / 2.0))
        return float(stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift))
    bound = float(stats.t.isf(level / 2.0, count - 1))
    if shift > 30.0 * max(bound, 1.0):
        return 1.0
    found = float(stats.nct.sf(bound, count - 1, shift))
    other = float(stats.nct.cdf(-bound, count - 1, shift))
    # scipy gives NaN for the far tail on the other side, where it is below 1e-12.
    return min(1.0, found + other) if other > 0.0 else found


def minimal_effect(spread: float, count: int, level: float) -> float:
    """The smallest effect that `count` pairs find with a probability of 0.8."""
    if spread == 0.0:
        return 0.0
    most = 1.0
    while paired_power(most, 1.0, count, level) < WANTED_POWER:
        most *= 2.0
    found = optimize.root_scalar(
        lambda effect: paired_power(effect, 1.0, count, level) - WANTED_POWER, bracket=(0.0, most)
    )
    return spread * float(found.root)


def pairs_needed(effect: float, spread: float, level: float, fewest: int = 3) -> int | None:
    """The fewest pairs, from `fewest` on, that find an effect with a probability of 0.8.

    None where even `MOST_PAIRS` would not.
    """

    def enough(count: int) -> bool:
        return paired_power(effect, spread, count, level) >= WANTED_POWER

    high = low = max(fewest, 3)
    if enough(high):
        return high
    while not enough(high):
        if high >= MOST_PAIRS:
            return None
        low, high = high, min(2 * high, MOST_PAIRS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high

"""A treatment beside one control."""

import dataclasses
from enum import StrEnum


class Word(StrEnum):
    """What may be said of a treatment beside a control; never that there is no difference."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent within the smallest effect of interest"
    UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Treatment minus control over seeds, in the metric's unit.

    The interval is a BCa bootstrap interval at 1 - alpha, the inner one at 1 - 2 alpha, each for
    this pair alone; p-values with `_holm` are corrected over the controls of the design.
    """

    control: str
    differences: tuple[float, ...]
    """In the order of the design's seeds."""
    mean: float
    median: float
    spread: float
    """Standard deviation of the differences."""
    low: float
    high: float
    inner_low: float
    inner_high: float
    p: float
    """Two-sided sign-flip test of a mean of 0."""
    p_equivalent: float
    """The larger of two one-sided sign-flip tests: below the smallest effect, above minus it."""
    d_z: float | None
    """Mean over spread (Cohen, 1988); None where all differences are the same."""
    superiority: float
    """Part of the seeds in which the treatment is better, ties counted half."""
    power: float
    """Of finding the smallest effect of interest, with these seeds and this spread."""
    minimal_effect: float
    """The effect that is found with a probability of 0.8."""
    seeds_needed: int | None
    """To find the smallest effect of interest with 0.8; None beyond `MOST_PAIRS`."""
    p_holm: float = 1.0
    p_equivalent_holm: float = 1.0
    word: Word = Word.UNDECIDED

    @property
    def degenerate(self) -> bool:
        """Whether all differences are the same, so that the interval is one value."""
        return self.spread == 0.0

"""Whether a kernel whose trial is over stays, by its measured worth."""

import dataclasses
import math
from statistics import NormalDist
from typing import Literal, NamedTuple, get_args

from esper.tamiyo._check import require, require_one_of
from esper.tamiyo._controller import Action, Decision, Observation, Worth
from esper.tamiyo._places import Place

Side = Literal["value", "low"]
"""By what a worth is judged: the measured value, or the lower end of its 95 % interval."""

_WIDTH = 2.0 * NormalDist().inv_cdf(0.975)
"""Of a 95 % interval, in standard errors."""


class Verdict(NamedTuple):
    """What is to become of a kernel, and the worth that says so."""

    decision: Decision
    worth: Worth


@dataclasses.dataclass(frozen=True)
class VerdictRule:
    """Keeps a kernel whose removal would raise the validation loss by more than `min_worth`."""

    min_worth: float = 0.0
    judge_by: Side = "value"
    """With "low" a kernel stays only where the interval's lower end is above `min_worth`: chance
    keeps one in 40 kernels that are worth nothing, rather than every other one."""

    def __post_init__(self) -> None:
        require("min_worth", self.min_worth)
        require_one_of("judge_by", self.judge_by, get_args(Side))

    def judge(self, observation: Observation, place: Place) -> Verdict:
        """Measure a kernel's worth: FOSSILIZE or UNLOAD.

        What is not a number does not keep a kernel. The decision's confidence is that of a
        normal error with the interval's width: Φ(|worth - min_worth| / standard error), in
        [0.5, 1]; 0.5 where there is no interval.
        """
        worth = observation.worth(*place)
        judged = worth.low if self.judge_by == "low" else worth.value
        keep = judged > self.min_worth
        told = f"validation loss rises by {worth.value:.4g} without it"
        if math.isfinite(worth.low) and math.isfinite(worth.high):
            told += f" (95 % interval {worth.low:.4g} to {worth.high:.4g})"
        compared = "more" if keep else "not more"
        end = ", by the interval's lower end" if self.judge_by == "low" else ""
        decision = Decision(
            Action.FOSSILIZE if keep else Action.UNLOAD,
            *place,
            f"{told}, {compared} than {self.min_worth:g}{end}",
            confidence=_confidence(worth, self.min_worth),
        )
        return Verdict(decision, worth)


def _confidence(worth: Worth, threshold: float) -> float:
    error = (worth.high - worth.low) / _WIDTH
    distance = abs(worth.value - threshold)
    if not (math.isfinite(error) and math.isfinite(distance)) or error < 0.0:
        return 0.5
    if error == 0.0:
        return 1.0 if distance > 0.0 else 0.5
    return NormalDist().cdf(distance / error)

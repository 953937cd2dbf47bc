"""What a comparison sets out to find, written down before its runs are looked at."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

from esper.errors import InputError

Budget = Literal["steps", "flops"]
"""What all arms were given the same amount of: optimiser steps, or training FLOPs."""

Metric = Literal["test_accuracy", "test_loss", "reward"]
"""What arms are judged by, at the end of a run."""

ARMS: dict[str, str] = {
    "static-small": "the host alone",
    "static-final": "the host with the kernels that the treatment kept, trained from step 0",
    "scratch": "the grown shape from step 0, with first parameters of its own",
    "fixed": "kernels grafted by a schedule that looks at nothing",
    "random": "kernels grafted at random",
    "heuristic": "kernels grafted by the heuristic controller",
    "bandit": "kernels grafted by the bandit controller",
    "learned": "kernels grafted by a policy that was trained in the gym",
}
"""The arms that Esper knows by name; a design may have others."""

NEEDED_CONTROLS = ("static-small", "static-final", "fixed", "random")
"""Controls without which nothing shows that growth, or deciding when to grow, helps."""

_T = TypeVar("_T")

HIGHER_IS_BETTER: dict[Metric, bool] = {"test_accuracy": True, "test_loss": False, "reward": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """One treatment against its controls, under one budget.

    Raises:
        InputError: for a design that cannot be judged, naming the field.
    """

    treatment: str
    controls: tuple[str, ...]
    seeds: tuple[int, ...]
    """Of randomness: every arm is run once with each, and arms are paired by them."""
    smallest_effect: float
    """The smallest difference in the metric that would matter, above 0, in the metric's unit."""
    metric: Metric = "test_accuracy"
    budget: Budget = "steps"
    task_by_seed: bool = False
    """Whether each seed has data and a host of its own, drawn from one family."""
    alpha: float = 0.05
    """Bound, in (0, 0.5), on the probability of any false "better" or "worse" over all controls.

    The same bound holds for any false "equivalent"."""

    def __post_init__(self) -> None:
        if repeated := _repeated(self.arms):
            raise InputError(
                f"the design is not valid: expected every arm once, got {repeated!r} as two arms;"
                " name a treatment that is no control, and each control once"
            )
        for arm in self.arms:
            if not arm.strip() or not arm.isprintable():
                raise InputError(
                    f"the design is not valid: expected arms with printable names, got {arm!r};"
                    " rename it"
                )
        if not self.controls:
            raise InputError(
                "the design is not valid: expected at least one control, got none; growth is"
                f" compared with {', '.join(NEEDED_CONTROLS)}"
            )
        if not self.seeds or (repeated := _repeated(self.seeds)) is not None:
            got = "none" if not self.seeds else f"{repeated} twice"
            raise InputError(
                f"the design is not valid: expected seeds that differ, got {got}; give one for"
                " each run of an arm"
            )
        if self.metric not in get_args(Metric):
            raise InputError(
                f"the design is not valid: expected the metric to be one of"
                f" {', '.join(get_args(Metric))}, got {self.metric!r}; choose one of them"
            )
        if self.budget not in get_args(Budget):
            raise InputError(
                f"the design is not valid: expected the budget to be one of"
                f" {', '.join(get_args(Budget))}, got {self.budget!r}; choose one of them"
            )
        if not 0.0 < self.alpha < 0.5:
            raise InputError(
                f"the design is not valid: expected alpha between 0 and 0.5, got {self.alpha};"
                " 0.05 is usual"
            )
        if not (0.0 < self.smallest_effect < math.inf):
            raise InputError(
                "the design is not valid: expected a smallest effect of interest above 0, got"
                f" {self.smallest_effect}; say which difference in {self.metric} would matter"
            )

    @property
    def arms(self) -> tuple[str, ...]:
        """The treatment and then the controls."""
        return (self.treatment, *self.controls)

    @property
    def level(self) -> float:
        """The level of one pair at the strictest step of Holm's procedure: alpha / controls."""
        return self.alpha / len(self.controls)

    @property
    def direction(self) -> int:
        """1 where a higher value of the metric is better, else -1."""
        return 1 if HIGHER_IS_BETTER[self.metric] else -1

    @property
    def controls_left_out(self) -> tuple[str, ...]:
        """Controls that a claim about growth needs and that are not among the arms."""
        return tuple(arm for arm in NEEDED_CONTROLS if arm not in self.arms)


def _repeated(values: Sequence[_T]) -> _T | None:
    return next((value for value in values if values.count(value) > 1), None)

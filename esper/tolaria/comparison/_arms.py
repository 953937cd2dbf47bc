"""What the runs of one arm came to, over seeds."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from esper.tolaria.comparison._design import Metric
from esper.tolaria.comparison._outcome import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """The metric and the costs of an arm's runs; None where no run recorded it."""

    arm: str
    runs: int
    mean: float | None
    """Of the metric."""
    median: float | None
    interquartile_mean: float | None
    """Mean of the middle half: robust where a run or two fail, and what Agarwal et al. (2021),
    "Deep Reinforcement Learning at the Edge of the Statistical Precipice", report over tasks."""
    least: float | None
    greatest: float | None
    parameters: float | None
    """This and all that follow are medians over the runs."""
    steps: float | None
    training_flops: float | None
    kept: float | None
    removed: float | None
    compilations: float | None
    seconds: float | None
    """Wall time of a run; reported, never judged."""


def summarise(arm: str, runs: Sequence[Outcome], metric: Metric) -> ArmSummary:
    """Summarise the runs of an arm; the order of the runs does not matter."""
    values = np.sort(np.array(_known(getattr(run, metric) for run in runs)))
    some = len(values) > 0

    def middle(field: str) -> float | None:
        found = _known(getattr(run, field) for run in runs)
        return float(np.median(found)) if found else None

    return ArmSummary(
        arm=arm,
        runs=len(runs),
        mean=float(values.mean()) if some else None,
        median=float(np.median(values)) if some else None,
        interquartile_mean=float(stats.trim_mean(values, 0.25)) if some else None,
        least=float(values[0]) if some else None,
        greatest=float(values[-1]) if some else None,
        parameters=middle("parameters"),
        steps=middle("steps"),
        training_flops=middle("training_flops"),
        kept=middle("kept"),
        removed=middle("removed"),
        compilations=middle("compilations"),
        seconds=middle("seconds"),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and np.isfinite(value)]

"""The measurements of a run, however many, in a bounded number of points."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

SCALARS = (
    "train_loss", "validation_loss", "test_loss", "validation_accuracy", "test_accuracy",
    "parameters", "flops", "learning_rate", "speed",
)  # fmt: skip
"""What is kept of each measurement; `speed` is in steps a second since the one before."""

BANDED = SCALARS[:5]
"""What also keeps its least and greatest value where a point stands for several measurements."""

POINTS = 1024
"""Most points."""


@dataclasses.dataclass
class Seeds:
    """What the seeds were at one step, each `[layers, seeds]`."""

    stages: np.ndarray
    """u8."""
    alphas: np.ndarray
    """f32."""
    health: np.ndarray
    """f32; NaN where none was measured."""

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and seeds."""
        return self.stages.shape[0], self.stages.shape[1]


@dataclasses.dataclass
class Point:
    """One measurement, or several that follow each other."""

    step: int
    """Of the last of them."""
    count: int
    values: dict[str, float | None]
    """Of the last of them, by `SCALARS`."""
    low: dict[str, float | None]
    """By `BANDED`."""
    high: dict[str, float | None]
    seeds: Seeds
    """At the last of them."""


class History:
    """Points over steps. When there are too many, each two become one.

    Measurements whose steps lie before those at hand replace them: the run went back.
    """

    def __init__(self, points: int = POINTS) -> None:
        self._most = points
        self.points: list[Point] = []
        self.each = 1
        """Measurements that a point stands for, but for the last."""
        self.rows = 0
        """Measurements taken in."""
        self.generation = 0
        """Counts how often points other than the last have changed."""
        self._before: tuple[int, float] | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Take in a measurement.

        Raises:
            ValueError, TypeError, KeyError: for a row that is none; nothing is changed.
        """
        step, seeds = _step(row), _seeds(row)
        values = {key: number(row.get(key)) for key in SCALARS}
        seconds = _total(row)
        self._go_back(step)
        values["speed"] = self._speed(step, seconds)
        self._before = None if seconds is None else (step, seconds)
        self.rows += 1
        band = {key: values[key] for key in BANDED}
        fresh = Point(step, 1, values, band, dict(band), seeds)
        if self.points and self.points[-1].count < self.each:
            self.points[-1] = _merged(self.points[-1], fresh)
            return
        self.points.append(fresh)
        if len(self.points) > self._most:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            odd = self.points[-1:] if len(self.points) % 2 else []
            self.points = [_merged(*pair) for pair in pairs] + odd
            self.each *= 2
            self.generation += 1

    def _go_back(self, step: int) -> None:
        if not self.points or self.points[-1].step < step:
            return
        while self.points and self.points[-1].step >= step:
            self.points.pop()
        self.generation += 1
        self._before = None

    def _speed(self, step: int, seconds: float | None) -> float | None:
        if self._before is None or seconds is None:
            return None
        steps, spent = step - self._before[0], seconds - self._before[1]
        return steps / spent if steps > 0 and spent > 0 else None


def _merged(first: Point, second: Point) -> Point:
    return Point(
        second.step,
        first.count + second.count,
        second.values,
        {key: _least(first.low[key], second.low[key], min) for key in BANDED},
        {key: _least(first.high[key], second.high[key], max) for key in BANDED},
        second.seeds,
    )


def _least(first: float | None, second: float | None, which: Any) -> float | None:
    known = [value for value in (first, second) if value is not None]
    return which(known) if known else None


def _step(row: Mapping[str, Any]) -> int:
    step = row["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"its step is {step!r}, expected a whole number from 0")
    return step


def _seeds(row: Mapping[str, Any]) -> Seeds:
    stages = _grid(row["stages"], np.uint8)
    alphas = _grid(row["alphas"], np.float32)
    found = row.get("health")
    health = (
        np.full(stages.shape, np.nan, np.float32) if found is None else _grid(found, np.float32)
    )
    if not stages.shape == alphas.shape == health.shape:
        raise ValueError(
            f"its stages, alphas and health differ in shape: {stages.shape}, {alphas.shape} and"
            f" {health.shape}"
        )
    return Seeds(stages, alphas, health)


def _grid(rows: Any, dtype: type[np.generic]) -> np.ndarray:
    with np.errstate(all="ignore"):
        grid = np.array(rows, dtype=dtype)
    if grid.ndim != 2:
        if grid.size:
            raise ValueError(f"a grid of seeds has {grid.ndim} axes, expected layers and seeds")
        return np.zeros((0, 0), dtype)
    return grid


def _total(row: Mapping[str, Any]) -> float | None:
    """All seconds that a run has spent."""
    seconds = row.get("seconds")
    if not isinstance(seconds, Mapping):
        return None
    spent = [value for value in map(number, seconds.values()) if value is not None]
    return sum(spent) if spent else None


def number(value: object) -> float | None:
    """A measured value; None for one that is missing or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None

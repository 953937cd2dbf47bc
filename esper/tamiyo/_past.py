"""What a run was at the boundaries before, as far as a policy sees it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from esper.tamiyo._controller import Observation
from esper.tamiyo.graph import PAST
from esper_functional import SeedLifecycleState

_KEPT = 2 * PAST
"""Boundaries that are kept: more than are seen, so that a run may go back by some."""

_HEALTHY = 2
"""Of them, the newest whose health is kept."""


class _Boundary(NamedTuple):
    """One boundary."""

    number: int
    step: int
    train: float | None
    validation: float | None
    health: np.ndarray | None
    """f32 `[sites, seeds]`; None where it is not kept."""


class Seen(NamedTuple):
    """The past at a boundary, which is a part of it."""

    train_loss: Float[np.ndarray, " past"]
    """f32 `[PAST]`, the newest first; NaN where there was none."""
    validation_loss: Float[np.ndarray, " past"]
    first_loss: float
    age: Float[np.ndarray, "sites seeds"]
    """f32: boundaries since the graft; 0 without one."""
    judged: Bool[np.ndarray, "sites seeds"]
    """Whether a kernel is blended there, which alone is judged."""
    health: Float[np.ndarray, "sites seeds"]
    """f32: of seeds that are judged; NaN for others."""
    health_before: Float[np.ndarray, "sites seeds"]


class Past:
    """Losses, health and ages of grafts, from boundary to boundary.

    Where the run goes back, what was seen at that step and since is forgotten.
    """

    def __init__(self) -> None:
        self._boundaries: list[_Boundary] = []
        self._first: float | None = None
        self._kernels = np.zeros((0, 5), np.int64)
        """`[held, 5]`: layer, seed, both words of the kernel's id, and the number of the boundary
        at which it was asked for."""

    def see(self, observation: Observation) -> Seen:
        """Take note of a boundary; again at the same one, it gives the same."""
        step = observation.step
        undone = [own for own in self._boundaries if own.step >= step]
        self._boundaries = self._boundaries[: len(self._boundaries) - len(undone)]
        if undone:
            number = undone[0].number
        else:
            number = self._boundaries[-1].number + 1 if self._boundaries else 1
        if number == 1 or self._first is None:
            first = observation.first_loss
            self._first = _json(first if math.isfinite(first) else observation.validation_loss)
        age = self._ages(observation, number)
        judged = _judged(observation)
        score = np.asarray(observation.seeds.health)
        health = np.where(judged, score, np.nan).astype(np.float32)
        before = self._boundaries[-1].health if self._boundaries else None
        losses = (_json(observation.train_loss), _json(observation.validation_loss))
        self._boundaries.append(_Boundary(number, step, *losses, health))
        self._boundaries = self._boundaries[-_KEPT:]
        faded = self._boundaries[:-_HEALTHY]
        self._boundaries[: len(faded)] = [own._replace(health=None) for own in faded]
        train, validation = self._losses(observation.first_loss)
        first = math.nan if self._first is None else self._first
        nowhere = np.full(health.shape, np.nan, np.float32)
        before = nowhere if before is None else before
        return Seen(train, validation, first, age, judged, health, before)

    def _losses(self, first_loss: float) -> tuple[np.ndarray, np.ndarray]:
        train, validation = np.full((2, PAST), np.nan, np.float32)
        newest = self._boundaries[: -PAST - 1 : -1]
        train[: len(newest)] = [_number(own.train) for own in newest]
        validation[: len(newest)] = [_number(own.validation) for own in newest]
        if newest[-1].number == 1 and len(newest) < PAST:
            # Before the first decision nothing was trained, but it was judged.
            validation[len(newest)] = first_loss
        return train, validation

    def _ages(self, observation: Observation, number: int) -> np.ndarray:
        stage = np.asarray(observation.seeds.stage)
        words = np.asarray(observation.seeds.kernel_id).astype(np.int64)
        layers, seeds = np.nonzero(stage != int(SeedLifecycleState.DORMANT))
        born = np.full((*stage.shape, 3), -1, np.int64)
        known = self._kernels
        born[known[:, 0], known[:, 1]] = known[:, 2:]
        now, then = words[layers, seeds], born[layers, seeds]
        same = (now == then[:, :2]).all(axis=1) & (then[:, 2] >= 0)
        # What is new was asked for at the boundary before.
        asked = np.minimum(np.where(same, then[:, 2], number - 1), number - 1)
        self._kernels = np.column_stack([layers, seeds, now, asked]).astype(np.int64)
        age = np.zeros(stage.shape, np.float32)
        age[layers, seeds] = number - asked
        return age

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        return {
            "boundaries": [[*own[:-1], _scores(own.health)] for own in self._boundaries],
            "first_loss": self._first,
            "kernels": self._kernels.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        self._boundaries = [
            _Boundary(number, step, train, validation, _scored(scores))
            for number, step, train, validation, scores in state["boundaries"]
        ]
        self._first = state["first_loss"]
        self._kernels = np.array(state["kernels"], np.int64).reshape(-1, 5)


def _judged(observation: Observation) -> np.ndarray:
    state = observation.seeds
    stage = np.asarray(state.stage)
    runs = (stage == int(SeedLifecycleState.ACTIVE)) | (stage == int(SeedLifecycleState.FOSSILIZED))
    return runs & ~np.asarray(state.incubating)


def _scores(health: np.ndarray | None) -> dict[str, Any] | None:
    """As JSON values, of which there are as many as kernels that are judged."""
    if health is None:
        return None
    judged = np.nonzero(~np.isnan(health))
    places = [own.tolist() for own in judged]
    return {"shape": list(health.shape), "places": places, "scores": health[judged].tolist()}


def _scored(scores: Mapping[str, Any] | None) -> np.ndarray | None:
    if scores is None:
        return None
    health = np.full(scores["shape"], np.nan, np.float32)
    health[tuple(np.array(own, np.int64) for own in scores["places"])] = scores["scores"]
    return health


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value

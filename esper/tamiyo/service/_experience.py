"""What came of decisions, for who learns from them while models train."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from esper.tamiyo._controller import Action, Decision
from esper.tamiyo._places import Place
from esper.tamiyo.service._counts import LearningCounts
from esper.tamiyo.service._report import Report
from esper_functional import SeedLifecycleState

_SHOWN: Mapping[Action, frozenset[SeedLifecycleState]] = {
    Action.GRAFT: frozenset({SeedLifecycleState.LOADING, SeedLifecycleState.ACTIVE}),
    Action.FOSSILIZE: frozenset({SeedLifecycleState.FOSSILIZED}),
    Action.UNLOAD: frozenset({SeedLifecycleState.DORMANT}),
    Action.RESET: frozenset({SeedLifecycleState.DORMANT}),
    Action.RETARGET: frozenset({SeedLifecycleState.ACTIVE}),
}
"""The stages of a seed in which an action that was done shows in the next report."""


class Experience(NamedTuple):
    """One boundary of one model."""

    model: str
    before: Report
    decisions: tuple[Decision, ...]
    """What was done, asked for at this boundary or at the one before; empty where nothing was."""
    after: Report
    """The next one."""
    reward: float
    """See `measured_reward`."""


class Learner(Protocol):
    """Learns from experiences; it has a store of its own, and changes the advisor's policy."""

    @property
    def counts(self) -> LearningCounts:
        """What it has done so far; read by another thread for metrics."""
        ...

    def update(self, experiences: Sequence[Experience], seconds: float) -> None:
        """Take in what is new, and learn for no longer than so many seconds.

        Called between decisions, by the thread that decides; also where nothing is new.
        """
        ...


def was_done(decision: Decision, after: Report) -> bool:
    """Whether the report after a decision shows it. A run may have rules of its own."""
    return after.stage[decision.layer, decision.seed] in _SHOWN[decision.action]


def is_seen(decision: Decision, before: Report, after: Report) -> bool:
    """Whether a change between two reports is what a decision asked for."""
    place = decision.layer, decision.seed
    return place in changed_places(before, after) and was_done(decision, after)


def changed_places(before: Report, after: Report) -> set[Place]:
    """Seeds whose stage changed as it does not by itself: loading ends, and kernels fail."""
    by_itself = (after.stage == SeedLifecycleState.ERROR_RECOVERY) | (
        (before.stage == SeedLifecycleState.LOADING) & (after.stage == SeedLifecycleState.ACTIVE)
    )
    found = np.argwhere((before.stage != after.stage) & ~by_itself)
    return {(int(layer), int(seed)) for layer, seed in found}


def measured_reward(before: Report, after: Report, *, price: float = 0.0) -> float | None:
    """How far the validation loss fell, over the first one, less the price of what was added.

        r = (L_before - L_after) / L_first - price · (P_after - P_before) / P_host

    It is what was measured, and no more: how far the loss would have fallen without the decision
    is not taken off, as it is of rewards in a gym.

    Args:
        price: of as many parameters as the host has, from 0.

    Returns:
        None where one of the losses is not known, the first one is not above 0, or the reward is
        not finite.
    """
    own, then = before.data, after.data
    losses = own.validation_loss[0], then.validation_loss[0]
    first = own.first_loss
    if losses[0] is None or losses[1] is None or first is None or not first > 0.0:
        return None
    added = (then.parameters - own.parameters) / max(1, own.host_parameters)
    reward = (losses[0] - losses[1]) / first - price * added
    return reward if math.isfinite(reward) else None

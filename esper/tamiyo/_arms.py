"""Discounted upper confidence bounds over arms with rewards in [0, 1]."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

Arm = tuple[int, str]
"""(layer row, blueprint)."""


class DiscountedUcb:
    """Which arm to play next, when what an arm gives may change.

    D-UCB (Garivier and Moulines, ALT 2011): with discount γ in (0, 1], let N_i be the number of
    times that arm i was played and S_i the sum of what it gave, where everything is multiplied
    by γ at each play, and n = Σ N_i. The arm with the largest index is played:

        S_i / N_i + sqrt(ξ · ln(max(n, 1)) / N_i)

    With γ = 1 and ξ = 2 this is UCB1 (Auer, Cesa-Bianchi and Fischer, 2002). (Garivier and
    Moulines write 2 B sqrt(ξ' ln n / N_i) with rewards in [0, B]: ξ = 4 ξ' here. ln n is cut off
    at 0, since discounted counts can sum to less than 1.) Arms never played come first, and of
    equals one is drawn.

    Args:
        exploration: ξ, from 0.
        discount: γ.
    """

    def __init__(self, *, exploration: float, discount: float) -> None:
        self._exploration = exploration
        self._discount = discount
        self._arms: dict[Arm, tuple[float, float]] = {}
        """(N, S) of every arm that was played."""

    def record(self, arm: Arm, reward: float) -> None:
        """An arm was played and gave `reward`, in [0, 1]."""
        faded = {
            key: (count * self._discount, total * self._discount)
            for key, (count, total) in self._arms.items()
        }
        count, total = faded.get(arm, (0.0, 0.0))
        faded[arm] = (count + 1.0, total + reward)
        self._arms = faded

    def index(self, arm: Arm) -> float:
        """The upper confidence bound of an arm; infinite for one that was never played."""
        return self._bound(arm, self._played())

    def _played(self) -> float:
        return sum(count for count, _ in self._arms.values())

    def _bound(self, arm: Arm, played: float) -> float:
        count, total = self._arms.get(arm, (0.0, 0.0))
        if count <= 0.0:
            return math.inf
        return total / count + math.sqrt(self._exploration * math.log(max(played, 1.0)) / count)

    def describe(self, arm: Arm) -> str:
        """How often an arm was played, what it gave, and its index, in words."""
        count, total = self._arms.get(arm, (0.0, 0.0))
        if count <= 0.0:
            return "never tried"
        return (
            f"mean reward {total / count:.4g} over {count:.4g} tries, bound {self.index(arm):.4g}"
        )

    def choose(
        self, arms: Sequence[Arm], busy: Collection[Arm], random: np.random.Generator
    ) -> Arm:
        """The arm to play next.

        Args:
            arms: those that can be played, at least one.
            busy: those whose reward is awaited, which are played again only where no other is.
        """
        idle = [arm for arm in arms if arm not in busy] or list(arms)
        played = self._played()
        indices = [self._bound(arm, played) for arm in idle]
        highest = max(indices)
        best = [arm for arm, index in zip(idle, indices, strict=True) if index == highest]
        return best[int(random.integers(len(best)))]

    def state(self) -> list[list[Any]]:
        """What was played, as JSON values."""
        return [[*arm, *played] for arm, played in self._arms.items()]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Remember what `state` returned."""
        # The order is kept: sums of floats depend on it.
        self._arms = {
            (int(layer), str(blueprint)): (float(count), float(total))
            for layer, blueprint, count, total in state
        }


def trial_reward(
    worth: float,
    validation_loss: float,
    *,
    parameters: int,
    host_parameters: int,
    price: float,
) -> float:
    """What a trial gave, in [0, 1]: its worth net of its cost.

    The share of the loss without the kernel that the kernel takes away, less its parameters as
    a share of the host's times their price, and no less than 0:

        min(1, max(0, worth / (validation_loss + worth) - price · parameters / host_parameters))

    Both terms are free of a unit, and the loss is not below 0, so the first is at most 1. It is
    0 for a worth that is not above 0 or not a number. All harm is alike: an arm that ruins the
    network and one that does nothing are both never worth a graft.

    Args:
        worth: rise of the validation loss without the kernel.
        validation_loss: with the kernel, from 0.
        parameters: of the kernel, counted.
        host_parameters: of the host alone.
        price: share of the loss that as many parameters as the host has must earn.
    """
    without = validation_loss + worth
    if not (math.isfinite(without) and worth > 0.0 and without > 0.0):
        return 0.0
    net = worth / without - price * parameters / max(host_parameters, 1)
    return min(1.0, max(0.0, net))

"""What each kernel adds, fairly shared: Shapley values.

Shapley, A Value for n-Person Games, Contributions to the Theory of Games II, 1953. The players are
kernels, and what a coalition is worth is by how much the loss is lower with its kernels alone than
with none. They differ from removal costs where kernels do the same thing: the removal cost of each
of two twins is zero, while their Shapley values share what both are worth.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, islice
from math import factorial
from typing import NamedTuple

import numpy as np

from esper.errors import InputError
from esper.tolaria._trainee import Place, Trainee
from esper.tolaria.worth._removal import PARTS, check_places, part_losses

MOST_EXACT = 8
"""Places for which all coalitions are tried: 2^8 of them."""

_AT_ONCE = 64
"""Coalitions in one batched pass."""

Coalition = frozenset[int]
"""Of places, by their order."""


class ShapleyValue(NamedTuple):
    """A kernel's share of what all of them are worth together, in units of the loss."""

    value: float
    """Mean over the parts of the held-out data."""
    error: float
    """Standard error over those parts: how far other data of this kind would differ; NaN for one
    part."""
    sampling_error: float
    """Standard error of having tried some orders and not all; 0 where all coalitions were."""


def shapley_values(
    trainee: Trainee,
    places: Sequence[Place],
    parts: int = PARTS,
    *,
    split: str = "validation",
    permutations: int | None = None,
    random: np.random.Generator | None = None,
) -> dict[Place, ShapleyValue]:
    """The Shapley value of each kernel, of the game that `places` play; all others run as they do.

    φ_i = Σ_S |S|! (n - |S| - 1)! / n! · (v(S ∪ i) - v(S)), over the coalitions S without i, and
    v(S) = loss(∅) - loss(S). Their sum is v of all. With `permutations`, the mean of v(S ∪ i) -
    v(S) over S that come before i in random orders (Castro, Gómez and Tejada, Polynomial
    Calculation of the Shapley Value Based on Sampling, Computers & Operations Research 36, 2009);
    the sum is v of all in this case, too.

    Args:
        parts: see `removal_costs`.
        permutations: orders to draw, at least 2; None tries all coalitions, of 8 places at most.
        random: draws them.

    Raises:
        InputError: for a place at which no kernel runs, more than 8 places without `permutations`,
            or permutations without `random`.
    """
    check_places(trainee, places)
    if type(parts) is not int or parts < 1:
        raise InputError(f"`parts` must be an integer from 1 on, got {parts!r}")
    count = len(places)
    if not count:
        return {}
    if permutations is None and count > MOST_EXACT:
        raise InputError(
            f"Shapley values of {count} places would take {2**count:,} evaluations, and all"
            f" coalitions are tried for at most {MOST_EXACT} places: give `permutations` (100, say)"
            " and `random` to draw some, or take `removal_costs`"
        )
    orders: list[np.ndarray] = []
    if permutations is not None:
        if type(permutations) is not int or permutations < 2 or random is None:
            raise InputError(
                "`permutations` must be an integer from 2 on, together with `random` that draws"
                f" them; got {permutations!r} and {random!r}"
            )
        orders = [random.permutation(count) for _ in range(permutations)]
    coalitions = _before_each(orders) if orders else list(_coalitions(count))
    with np.errstate(invalid="ignore"):  # of infinite losses, whose differences are NaN
        worth = _worth(trainee, places, coalitions, parts, split)
        if orders:
            steps = np.stack([_marginals(order, worth) for order in orders])
            shares = steps.mean(0)
            sampling = steps.mean(2).std(0, ddof=1) / np.sqrt(len(orders))
        else:
            shares = np.stack([_exact(i, count, worth) for i in range(count)])
            sampling = np.zeros(count)
        held_out = shares.shape[1]
        errors = np.full(count, np.nan)
        if held_out > 1:
            errors = shares.std(1, ddof=1) / np.sqrt(held_out)
    return {
        place: ShapleyValue(float(share.mean()), float(error), float(drawn))
        for place, share, error, drawn in zip(places, shares, errors, sampling, strict=True)
    }


def _before_each(orders: Sequence[np.ndarray]) -> list[Coalition]:
    """The coalitions that the orders pass through, each once."""
    needed = {frozenset(map(int, o[:i])) for o in orders for i in range(len(o) + 1)}
    return sorted(needed, key=lambda c: (len(c), sorted(c)))


def _coalitions(count: int) -> Iterator[Coalition]:
    for size in range(count + 1):
        yield from map(frozenset, combinations(range(count), size))


def _worth(
    trainee: Trainee,
    places: Sequence[Place],
    coalitions: Sequence[Coalition],
    parts: int,
    split: str,
) -> dict[Coalition, np.ndarray]:
    """What each coalition is worth, f64 `[parts]`; the empty one is among them."""
    losses: dict[Coalition, np.ndarray] = {}
    waiting = iter(coalitions)
    while batch := list(islice(waiting, _AT_ONCE)):
        muted: list[Collection[Place]] = [
            tuple(place for i, place in enumerate(places) if i not in coalition)
            for coalition in batch
        ]
        losses |= dict(zip(batch, part_losses(trainee, split, muted, parts), strict=True))
    return {coalition: losses[frozenset()] - loss for coalition, loss in losses.items()}


def _exact(player: int, count: int, worth: dict[Coalition, np.ndarray]) -> np.ndarray:
    total = np.zeros_like(worth[frozenset()])
    for coalition, value in worth.items():
        if player not in coalition:
            before = len(coalition)
            share = factorial(before) * factorial(count - before - 1) / factorial(count)
            total += share * (worth[coalition | {player}] - value)
    return total


def _marginals(order: np.ndarray, worth: dict[Coalition, np.ndarray]) -> np.ndarray:
    """What each player added when it came, `[players, parts]`."""
    added = np.zeros((len(order), len(worth[frozenset()])))
    for i, player in enumerate(order):
        before = frozenset(map(int, order[:i]))
        added[player] = worth[before | {int(player)}] - worth[before]
    return added

"""What a network loses without a kernel: its removal cost."""

from collections.abc import Collection, Sequence

import numpy as np

from esper.errors import InputError
from esper.nissa import half_width
from esper.tamiyo import Worth
from esper.tolaria._trainee import Place, Trainee
from esper_functional import running_seeds

PARTS = 8
"""Of the held-out data, by default."""


def removal_costs(
    trainee: Trainee, places: Sequence[Place], parts: int = PARTS, *, split: str = "validation"
) -> dict[Place, Worth]:
    """How much the mean loss rises without each kernel, by itself; positive where it helps.

    The held-out data are cut into parts, and the loss with and without the kernel is compared part
    by part, so that what makes one part harder than another falls out. The interval is Student's t
    over the parts, at 95 %: it tells how far other data of this kind would differ, and nothing of
    other seeds of the run.

    Args:
        parts: how many, at least 1; one has no interval, and its ends are NaN. The same number is
            asked of `losses_without`, which gives fewer for a split of fewer examples.

    Returns:
        By place, in the order given. NaN and infinities in the losses are handed on.

    Raises:
        InputError: for a place at which no kernel runs, one named twice, or fewer than one part.
    """
    check_places(trainee, places)
    if type(parts) is not int or parts < 1:
        raise InputError(f"`parts` must be an integer from 1 on, got {parts!r}")
    if not places:
        return {}
    variants: list[Collection[Place]] = [(), *((place,) for place in places)]
    losses = part_losses(trainee, split, variants, parts)
    with np.errstate(invalid="ignore"):  # of infinite losses, whose differences are NaN
        gaps = losses[1:] - losses[0]
    return {place: interval(gap) for place, gap in zip(places, gaps, strict=True)}


def interval(differences: np.ndarray) -> Worth:
    """The mean of paired differences `[parts]` and its 95 % t-interval."""
    with np.errstate(invalid="ignore"):  # of infinite differences, whose interval is NaN
        mean = float(differences.mean())
        if len(differences) < 2:
            return Worth(mean, float("nan"), float("nan"))
        half = float(half_width(differences))
    return Worth(mean, mean - half, mean + half)


def part_losses(
    trainee: Trainee, split: str, variants: Sequence[Collection[Place]], parts: int
) -> np.ndarray:
    """`Trainee.losses_without` in f64, `[variants, parts]`."""
    losses = trainee.losses_without(split, variants, parts=parts)
    return np.asarray(losses).astype(np.float64)


def check_places(trainee: Trainee, places: Sequence[Place]) -> None:
    """Check that a kernel runs at each place.

    Raises:
        InputError: naming those where none does, or that were named twice.
    """
    running = [tuple(map(int, place)) for place in running_seeds(trainee.seeds)]
    missing = [place for place in places if tuple(place) not in running]
    if missing:
        raise InputError(
            f"no kernel runs at {', '.join(map(str, missing))} (layer row, seed): kernels run at"
            f" {', '.join(map(str, running)) or 'no place'}"
        )
    twice = sorted({place for place in places if list(places).count(place) > 1})
    if twice:
        raise InputError(f"`places` names {', '.join(map(str, twice))} more than once")

"""When training counts as having gone wrong, and what is done about it, time after time."""

import math
from collections.abc import Sequence

import numpy as np

from esper.errors import EsperError

REMEDIES = (
    "the same steps again",
    "the youngest kernel is unloaded",
    "the batches are left out and learning rates halved",
)
"""What is done when a run is taken back to a boundary for the first, second, third time in a row,
each together with those before it. A fault of the machine is gone at the first; training is a
function of its state, so what comes from the run itself comes again, and needs the others."""


class DivergedError(EsperError):
    """Training diverged, and went on diverging after it was taken back."""


def trouble_in(
    losses: np.ndarray, first_step: int, *, first_loss: float | None, factor: float | None
) -> str | None:
    """Why the steps since the last boundary count as diverged; None where they do not.

    Args:
        losses: f32 `[steps]`, of the steps from `first_step` on.
        first_loss: mean of the first boundary that had losses.
        factor: how many times that a mean may be; None for any.
    """
    wrong = np.flatnonzero(~np.isfinite(losses))
    if len(wrong):
        at = int(wrong[0])
        return f"the training loss is {losses[at]} at step {first_step + at}"
    if factor is None or first_loss is None or not len(losses):
        return None
    mean = float(np.mean(losses, dtype=np.float64))
    if mean <= factor * first_loss:
        return None
    return (
        f"the training loss is {mean:.4g} from step {first_step} on, more than {factor:g} times"
        f" the {first_loss:.4g} at the beginning"
    )


def trouble_of(validation_loss: float) -> str | None:
    """Why a network counts as diverged by what it gives on held-out data."""
    if math.isfinite(validation_loss):
        return None
    return f"the validation loss is {validation_loss}"


def given_up(cause: str, rollbacks: Sequence[int], tried: int, path: object) -> DivergedError:
    """The error of a run that is taken back no more."""
    done = "; ".join(REMEDIES[: min(tried, len(REMEDIES))]) or "nothing"
    return DivergedError(
        f"training diverged: {cause}. It was taken back {tried} times in a row ({done}), and"
        f" {len(rollbacks)} times in all. What was recorded up to there is whole in {path}; begin"
        " another run with a lower learning_rate, with clip_norm, or with a larger max_rollbacks"
    )

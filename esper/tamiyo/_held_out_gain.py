"""A trigger: the held-out loss gains too little for the steps that it is given."""

import math
from collections.abc import Mapping
from typing import Any

from esper.tamiyo._check import require
from esper.tamiyo._controller import Observation
from esper.tamiyo._trigger import Cue


class HeldOutGainTrigger:
    """Fires when held-out data gained less than a threshold over a window: convergent growth.

    The definition is the convergent growing policy of AutoGrow (Wen et al., KDD 2020): grow
    when the validation accuracy improved by less than tau over the last K epochs. Here it is
    the validation loss V, which every task has and which moves before the accuracy does, the
    gain is relative, and the window is K boundaries, so that tau is a price per fixed number
    of steps:

        gain = (V[t - K] - V[t]) / V[t - K] < tau

    AutoGrow found growth before convergence, so a large tau or a plain schedule, to do better
    than waiting for this to become small; both can be had here (see `ScheduleTrigger`).

    The score is the gain, which is negative where the loss rose. A loss that is not finite, or
    not above zero, at either end gives no cue. Where the run goes back, what was measured from
    that step on is forgotten; `reset` forgets everything, so the first cue of a network comes
    K boundaries after it became what it is.

    Args:
        window: K, in boundaries, from 1.
        min_gain: tau, below 1; 0 fires when the loss rose.

    Raises:
        InputError: for values out of range.
    """

    def __init__(self, *, window: int = 4, min_gain: float = 0.02) -> None:
        require("window of the held-out gain trigger", window, 1, whole=True)
        require("min_gain of the held-out gain trigger", min_gain, most=1)
        self._window = window
        self._min_gain = min_gain
        self._seen: list[tuple[int, float]] = []
        """(step, validation loss) of the last `window` + 1 boundaries."""

    def cue(self, observation: Observation) -> Cue | None:
        """See `Trigger.cue`."""
        seen = [(step, loss) for step, loss in self._seen if step < observation.step]
        seen.append((observation.step, observation.validation_loss))
        self._seen = seen[-self._window - 1 :]
        if len(self._seen) <= self._window:
            return None
        (since, before), (_, now) = self._seen[0], self._seen[-1]
        if not (math.isfinite(before) and math.isfinite(now) and before > 0.0):
            return None
        gain = (before - now) / before
        if not gain < self._min_gain:
            return None
        moved = f"fell by {gain:.4g}" if gain >= 0.0 else f"rose by {-gain:.4g}"
        reason = (
            f"validation loss {moved} of {before:.4g} since step {since}, less than the gain of"
            f" {self._min_gain:g} that is asked of {self._window} boundaries"
        )
        return Cue(reason, score=gain)

    def reset(self) -> None:
        """See `Trigger.reset`: the losses so far were another network's."""
        self._seen = []

    def state(self) -> dict[str, Any]:
        """See `Trigger.state`."""
        return {
            "seen": [[step, loss if math.isfinite(loss) else None] for step, loss in self._seen]
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Trigger.restore`."""
        self._seen = [
            (int(step), math.nan if loss is None else float(loss)) for step, loss in state["seen"]
        ]

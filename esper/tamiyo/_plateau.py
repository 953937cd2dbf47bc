"""A trigger: the training loss has stopped falling."""

import math
from collections.abc import Mapping
from typing import Any

from esper.tamiyo._check import require
from esper.tamiyo._controller import Observation
from esper.tamiyo._trigger import Cue


class PlateauTrigger:
    """Fires when the training loss has not improved for some boundaries.

    A boundary improves where its loss is below (1 - `min_improvement`) times the best one so
    far; the first one does, and one that is not finite does not. The score is the number of
    boundaries since the last improvement. A run that goes back restores what its trigger was then;
    without that, a boundary of an earlier step than the last one begins anew.

    Args:
        patience: boundaries without improvement that make a plateau, from 1.
        min_improvement: relative fall of the loss below its best that counts, in [0, 1].

    Raises:
        InputError: for values out of range.
    """

    def __init__(self, *, patience: int = 2, min_improvement: float = 0.1) -> None:
        require("patience of the plateau trigger", patience, 1, whole=True)
        require("min_improvement of the plateau trigger", min_improvement, 0, 1)
        self._patience = patience
        self._min_improvement = min_improvement
        self._best = math.inf
        self._stale = 0
        self._step: int | None = None
        """Of the boundary before."""

    def cue(self, observation: Observation) -> Cue | None:
        """See `Trigger.cue`."""
        if self._step is not None and observation.step <= self._step:
            self.reset()
        self._step = observation.step
        loss = observation.train_loss
        if math.isfinite(loss) and loss < self._best * (1.0 - self._min_improvement):
            self._best, self._stale = loss, 0
        else:
            self._stale += 1
        if self._stale < self._patience:
            return None
        reason = (
            f"training loss {loss:.4g} has not fallen by {100 * self._min_improvement:g}%"
            f" for {self._stale} boundaries"
        )
        return Cue(reason, score=float(self._stale))

    def reset(self) -> None:
        """See `Trigger.reset`: the losses so far were another network's."""
        self._best, self._stale = math.inf, 0

    def state(self) -> dict[str, Any]:
        """See `Trigger.state`."""
        best = None if math.isinf(self._best) else self._best
        return {"best": best, "stale": self._stale, "step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Trigger.restore`."""
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._stale = int(state["stale"])
        self._step = None if state["step"] is None else int(state["step"])

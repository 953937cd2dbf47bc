"""A trigger: by chance."""

from collections.abc import Mapping
from typing import Any

from esper.tamiyo._check import require
from esper.tamiyo._controller import Observation
from esper.tamiyo._trigger import Cue


class RandomTrigger:
    """Fires at a boundary with a fixed probability, by the observation's generator alone.

    The score is the number drawn, uniform in [0, 1): it fires below `rate`.

    Args:
        rate: the probability, in [0, 1].

    Raises:
        InputError: for a rate out of range.
    """

    def __init__(self, *, rate: float = 0.1) -> None:
        require("rate of the random trigger", rate, 0, 1)
        self._rate = rate

    def cue(self, observation: Observation) -> Cue | None:
        """See `Trigger.cue`."""
        drawn = float(observation.random.random())
        if drawn >= self._rate:
            return None
        return Cue(f"drew {drawn:.4g}, below the rate of {self._rate:g}", score=drawn)

    def reset(self) -> None:
        """See `Trigger.reset`: chance does not look at the network."""

    def state(self) -> dict[str, Any]:
        """See `Trigger.state`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Trigger.restore`."""

"""When to grow, and perhaps where."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from esper.tamiyo._controller import Observation


class Cue(NamedTuple):
    """A trigger's word that now is the time to grow."""

    reason: str
    """What was found, in numbers."""
    layer: int | None = None
    """The layer row in which to grow, where the trigger knows one."""
    score: float = 0.0
    """What was compared with the trigger's threshold, in the unit that its class names."""


class Trigger(Protocol):
    """Watches a run and says when to grow; which kernel, and how many, is a controller's matter.

    It is asked once at every boundary. Where a run goes back, it meets a step again that it
    has seen: what it saw from that step on did not happen.
    """

    def cue(self, observation: Observation) -> Cue | None:
        """Take note of the boundary; a cue where it is time to grow."""
        ...

    def reset(self) -> None:
        """The network is another one now: measure anew what is measured of one network."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        ...

"""A trigger: every so many steps."""

from collections.abc import Mapping
from typing import Any

from esper.tamiyo._check import require
from esper.tamiyo._controller import Observation
from esper.tamiyo._timetable import Timetable
from esper.tamiyo._trigger import Cue


class ScheduleTrigger:
    """Fires at the first boundary at or after `first`, `first` + `every` and so on.

    It is AutoGrow's periodic growing policy (Wen et al., KDD 2020), and the control for every
    trigger that looks at something. The score is the time that came due, in steps.

    Args:
        first: the first time, in steps from 0.
        every: steps between two times, from 1.

    Raises:
        InputError: for values out of range.
    """

    def __init__(self, *, first: int = 0, every: int = 500) -> None:
        require("first of the schedule trigger", first, 0, whole=True)
        require("every of the schedule trigger", every, 1, whole=True)
        self._first = first
        self._every = every
        self._timetable = Timetable(first=first, every=every)

    def cue(self, observation: Observation) -> Cue | None:
        """See `Trigger.cue`."""
        time = self._timetable.due(observation.step)
        if time is None:
            return None
        self._timetable.serve(time, observation.step)
        due = self._first + time * self._every
        return Cue(f"step {due} of every {self._every} from {self._first}", score=float(due))

    def reset(self) -> None:
        """See `Trigger.reset`: a schedule does not look at the network."""

    def state(self) -> dict[str, Any]:
        """See `Trigger.state`."""
        return {"served": self._timetable.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Trigger.restore`."""
        self._timetable.restore(state["served"])

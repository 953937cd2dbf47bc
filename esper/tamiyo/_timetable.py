"""Regular times, and which of them have been served in a run that may go back."""

from collections.abc import Iterable


class Timetable:
    """The steps first, first + every, first + 2 · every and so on, each due once.

    A time is due at the first boundary at or after it. Of several that came due since the
    boundary before, the last one stands for all. Where a run goes back to a step, what was
    served at it or later was not served.

    Args:
        first: the first time, in steps.
        every: the distance of two, in steps, from 1.
    """

    def __init__(self, *, first: int, every: int) -> None:
        self._first = first
        self._every = every
        self._served: list[tuple[int, int]] = []
        """(which time, at which boundary), in order."""

    @property
    def served(self) -> int:
        """How many times were served."""
        return len(self._served)

    def due(self, step: int) -> int | None:
        """Which time is due at a boundary; None where none is."""
        self._served = [(time, at) for time, at in self._served if at < step]
        if step < self._first:
            return None
        last = (step - self._first) // self._every
        return last if not self._served or self._served[-1][0] < last else None

    def serve(self, time: int, step: int) -> None:
        """Note that a time that `due` named was served."""
        self._served.append((time, step))

    def state(self) -> list[list[int]]:
        """What was served, as JSON values."""
        return [list(pair) for pair in self._served]

    def restore(self, state: Iterable[Iterable[int]]) -> None:
        """Remember what `state` returned."""
        self._served = [(int(time), int(at)) for time, at in state]

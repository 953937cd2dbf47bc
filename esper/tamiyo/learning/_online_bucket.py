"""What a learner keeps of graphs of one shape, and how long it takes to learn from it."""

from collections import deque
from typing import Any

import jax
import numpy as np

from esper.tamiyo.learning._online_settings import OnlineSettings
from esper.tamiyo.learning._replay import ReplayStore, Transition

_MEASURED = 8
_DOUBTED = 600
"""Times that updates are put off for a single measurement, before it counts no more: at ten turns
a second an update that takes too long is made once a minute, and no more often."""


class Bucket:
    """Transitions of one shape, of which one program learns.

    Args:
        example: one transition.
        settings: of the learner.
        ordinal: of the bucket; it decides over the draws.
        capacity: transitions; None for as many as the settings allow.
    """

    def __init__(
        self,
        example: Transition,
        settings: OnlineSettings,
        ordinal: int,
        capacity: int | None = None,
    ) -> None:
        self._settings = settings
        self.store = ReplayStore(
            example,
            capacity_of(example, settings) if capacity is None else capacity,
            seed=settings.seed + ordinal,
        )
        self.taken = 0
        self.updates = 0
        """Those tried."""
        self.tried = False
        """Whether one was since this was made: its program is there then."""
        self._seconds: deque[float] = deque(maxlen=_MEASURED)
        self._doubts = 0
        """Times that updates were put off for the only measurement."""

    @property
    def due(self) -> int:
        """How many updates there are to be made for what was taken."""
        settings = self._settings
        if len(self.store) < min(settings.least, self.store.capacity):
            return 0
        return int(settings.replays * self.taken / settings.batch) - self.updates

    @property
    def seconds(self) -> float:
        """That an update is to have: as long as the longest of the last took."""
        return max(self._seconds, default=0.0)

    def took(self, seconds: float) -> None:
        """An update took so long."""
        self._doubts = 0
        self._seconds.append(seconds)

    def put_off(self) -> None:
        """There was too little time for an update: the longest of the last counts no more.

        Others may have shared the machine. In the end it is the shortest that counts, and that for
        a while: it may have been the only one.
        """
        self._doubts += len(self._seconds) == 1
        if len(self._seconds) > 1 or self._doubts >= _DOUBTED:
            self._seconds.remove(self.seconds)
            self._doubts = 0

    def add(self, transition: Transition) -> None:
        """Keep one."""
        self.store.add(jax.tree.map(lambda leaf: np.asarray(leaf)[None], transition))
        self.taken += 1

    def some(self) -> tuple[Any, np.ndarray]:
        """A batch to compile a program with, which draws nothing: the oldest, again and again."""
        first = jax.tree.map(lambda leaf: leaf[:1], self.store.all())
        count = self._settings.batch
        return (
            jax.tree.map(lambda leaf: np.repeat(leaf, count, axis=0), first),
            np.ones(count, np.float32),
        )


def capacity_of(example: Transition, settings: OnlineSettings) -> int:
    """How many transitions like this one a bucket may hold."""
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(example))
    return min(settings.capacity, settings.most_bytes // size)

"""Several steps in one call of a program, where that gives the same to the last bit.

A call takes some 80 µs on a CPU, longer than a step of a small network, and within a
call parameters stay where they are. So a loop of steps in a program is faster, and for
most networks trains as the steps one by one do. But XLA may lay arrays out differently
within a loop, as it does for convolutions, and then sums are rounded differently: so a
loop is held against single steps once, and is used only where all bits were the same.
"""

import time
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from esper.tolaria._jax_held import plain

STILL_STEPS = 5_000
"""Steps without a change of seeds after which this begins: compiling takes about a second."""

AT_ONCE = 25
"""Steps of one call; a request to stop is heard between calls."""

SHORT_STEP = 4e-3
"""Seconds; where steps take longer, a call is little of them, and a request to stop would wait."""


class Stillness:
    """For how long a network has trained without a change of its seeds."""

    def __init__(self) -> None:
        self.changed()

    def changed(self) -> None:
        """Begin anew."""
        self._steps, self._since, self._long = 0, time.perf_counter(), False

    def stepped(self, steps: int) -> None:
        """Count steps."""
        self._steps += steps

    @property
    def long(self) -> bool:
        """Whether a program for several steps will be worth its compiling; once so, it stays so."""
        if not self._long and self._steps >= STILL_STEPS:
            self._long = time.perf_counter() - self._since < SHORT_STEP * self._steps
        return self._long


class Exactness:
    """Which programs of several steps were found to be exact. Shared by all runs in a process."""

    def __init__(self) -> None:
        self._found: dict[Hashable, bool] = {}

    def known(self, key: Hashable) -> bool | None:
        """None where it was not looked at."""
        return self._found.get(key)

    def compare(self, key: Hashable, one: Any, other: Any) -> None:
        """Hold what a program gave against what single steps gave."""
        self._found[key] = _bits(one) == _bits(other)


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(plain(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]

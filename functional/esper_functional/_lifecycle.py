"""The life of a seed, as a table.

Every legal move is a row of `MOVES`; everything else is refused. The diagram
in the documentation is drawn from this table by `lifecycle_diagram`.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class SeedLifecycleState(IntEnum):
    """The stage of a seed; stored as uint8."""

    DORMANT = 0
    """Holds nothing and costs nothing."""
    LOADING = 1
    """A kernel was asked for and is being fetched or compiled."""
    ACTIVE = 2
    """The kernel runs, trains and is blended by alpha."""
    ERROR_RECOVERY = 3
    """The kernel failed; the host's own output stands in for it."""
    FOSSILIZED = 4
    """Runs for good: alpha and parameters are frozen."""


class Move(NamedTuple):
    """One legal move of a seed and what brings it about."""

    source: SeedLifecycleState
    target: SeedLifecycleState
    cause: str


_S = SeedLifecycleState

MOVES: tuple[Move, ...] = (
    Move(_S.DORMANT, _S.LOADING, "a load is asked for"),
    Move(_S.LOADING, _S.ACTIVE, "the kernel is ready"),
    Move(_S.LOADING, _S.DORMANT, "the kernel was not found or does not fit"),
    Move(_S.LOADING, _S.ERROR_RECOVERY, "the load failed"),
    Move(_S.ACTIVE, _S.DORMANT, "unload"),
    Move(_S.ACTIVE, _S.ERROR_RECOVERY, "third consecutive failure"),
    Move(_S.ACTIVE, _S.FOSSILIZED, "fossilise"),
    Move(_S.ERROR_RECOVERY, _S.DORMANT, "reset"),
    Move(_S.ERROR_RECOVERY, _S.LOADING, "retry"),
)

FAILURES_TO_RECOVERY = 3
"""Consecutive failures after which a seed stops running."""


def _legality() -> np.ndarray:
    table = np.zeros((len(_S), len(_S)), dtype=np.bool_)
    for move in MOVES:
        table[move.source, move.target] = True
    table.setflags(write=False)
    return table


LEGAL: np.ndarray = _legality()
"""bool[5, 5]: `LEGAL[source, target]`."""


def legal_moves(stage: SeedLifecycleState) -> tuple[SeedLifecycleState, ...]:
    """The stages that a seed in `stage` may move to, in the table's order."""
    return tuple(move.target for move in MOVES if move.source == stage)


def lifecycle_diagram() -> str:
    """The table as a Mermaid state diagram."""
    rows = [f"    {m.source.name} --> {m.target.name}: {m.cause}" for m in MOVES]
    return "\n".join(["stateDiagram-v2", "    [*] --> DORMANT", *rows, "    FOSSILIZED --> [*]"])

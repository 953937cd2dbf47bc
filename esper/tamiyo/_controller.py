"""What a controller sees and what it may ask for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

from esper.urza import KernelRecord
from esper_functional import SeedState


class Action(StrEnum):
    """What a controller may ask for; what it does not ask for stays as it is."""

    GRAFT = "graft"
    """Load a kernel into a DORMANT seed and ramp its alpha to 1."""
    FOSSILIZE = "fossilize"
    """Freeze an ACTIVE seed for good."""
    UNLOAD = "unload"
    """Empty an ACTIVE seed."""
    RESET = "reset"
    """Empty a seed in ERROR_RECOVERY."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """One request, with its reason for the record."""

    action: Action
    layer: int
    seed: int
    reason: str
    kernel_id: str = ""


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is known at a decision boundary. Nothing in it depends on a clock."""

    step: int
    train_loss: float
    """Mean over the steps since the last boundary."""
    validation_loss: float
    seeds: SeedState
    sites: Sequence[str]
    """Names of the layers, by row of `seeds`."""
    candidates: Mapping[int, Sequence[KernelRecord]]
    """Kernels that fit, by layer row; only layers that may grow are in it."""
    worth: Callable[[int, int], float]
    """Validation loss without the kernel of (layer, seed), minus with it."""


class Controller(Protocol):
    """Decides; holds no reference to what it decides about."""

    def decide(self, observation: Observation) -> list[Decision]:
        """The changes to make at this boundary."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        ...

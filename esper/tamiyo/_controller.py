"""What a controller sees and what it may ask for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from esper.contracts import Action as Action
from esper.tamiyo._probe import Probe
from esper.urza import KernelRecord
from esper_functional import SeedState


@dataclasses.dataclass(frozen=True)
class Decision:
    """One request, with its reason for the record."""

    action: Action
    layer: int
    seed: int
    reason: str
    kernel_id: str = ""
    """Of GRAFT."""
    initialisation: str = ""
    """Of GRAFT: how the kernel's first parameters are found; "" for the run's own way."""
    alpha: float = 1.0
    """Of GRAFT and RETARGET: where the ramp goes, in [0, 1]."""
    confidence: float = 1.0
    """How sure the controller is, in [0, 1]; safety may ask for a least one."""


class Veto(NamedTuple):
    """A decision that a rule of safety refused."""

    decision: Decision
    rule: str
    """The rule's name, such as `cooldown`."""
    reason: str
    """What the rule asks for, and what was found."""


class Cost(NamedTuple):
    """What a network costs, counted and not timed."""

    parameters: int
    flops: float
    """Of a forward pass of one example."""


class Worth(NamedTuple):
    """Rise of the validation loss without a kernel, and its 95 % interval over held-out batches."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is known at a decision boundary. Nothing in it depends on a clock."""

    step: int
    steps: int
    """At which the run ends."""
    train_loss: float
    """Mean over the steps since the last boundary."""
    validation_loss: float
    validation_accuracy: float
    seeds: SeedState
    sites: Sequence[str]
    """Names of the layers, by row of `seeds`."""
    candidates: Mapping[int, Sequence[KernelRecord]]
    """Kernels that fit, by layer row; only layers that may grow are in it."""
    host: Cost
    """Of the host alone."""
    now: Cost
    """Of the network as it is, kernels that are loading included."""
    rollbacks: Sequence[int]
    """The steps from which the run was taken back so far, in order."""
    worth: Callable[[int, int], Worth]
    """Measures the removal cost of the kernel of (layer, seed); costs a pass over held-out data."""
    probe: Callable[[int], Probe]
    """Measures what a layer row sees; costs a forward and a backward pass."""
    random: np.random.Generator
    """Of this run and step: the same whenever the step is trained again."""


class Controller(Protocol):
    """Decides; holds no reference to what it decides about."""

    def decide(self, observation: Observation) -> list[Decision]:
        """The changes to make at this boundary, in order of preference."""
        ...

    def told(
        self, observation: Observation, applied: Sequence[Decision], vetoed: Sequence[Veto]
    ) -> None:
        """Take note of what became of the decisions of `decide`, at the same boundary."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        ...

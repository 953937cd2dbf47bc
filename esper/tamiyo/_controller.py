"""What a controller sees and what it may ask for."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from esper.contracts import Action as Action
from esper.tamiyo._norms import SiteNorms
from esper.tamiyo._probe import Probe
from esper.tamiyo.graph import Topology
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
    uncertainty: float | None = None
    """Standard deviation of `effect` for want of data, from 0; None where it was not estimated."""
    effect: "Worth | None" = None
    """What the controller expects of it, in the unit of its reward; None without an estimate."""
    features: tuple[tuple[str, float], ...] = ()
    """What moved it most, by name, each with its part of the effect; the strongest first."""


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
    """A value and its 95 % interval.

    Of a kernel: the rise of the validation loss without it, over held-out batches. Of a decision:
    what it is expected to bring.
    """

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
    first_loss: float = math.nan
    """The validation loss at the run's first boundary; NaN where it is not known."""
    loss_spread: float = math.nan
    """Standard deviation of the steps' losses since the last boundary, over their mean."""
    worths: Callable[[Sequence[tuple[int, int]]], Mapping[tuple[int, int], Worth]] | None = None
    """Measures many places (layer row, seed) in one batched pass; None where nothing does."""
    norms: Callable[[], SiteNorms] | None = None
    """Measures gradients and parameters of all layers; costs a forward and a backward pass."""
    follows: Callable[[Sequence[int]], np.ndarray] | None = None
    """Measures of layer rows how much of the loss's gradient maps of their inputs follow, f32
    `[sites, 2]` (see `esper.tamiyo.graph.follows`); costs one forward and backward pass."""
    topology: Callable[[], Topology] | None = None
    """Which layer feeds which, found out once; None where that is not known."""
    recorded: Callable[[], Sequence[str] | None] | None = None
    """What was noted at this boundary when it was trained before, to be asked once all is measured
    that a controller measures; None where it was not, or not to here."""


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


@runtime_checkable
class Remarking(Protocol):
    """A controller that may have something to say at a boundary besides what it decides."""

    def remarks(self) -> Sequence[str]:
        """What is to be recorded beside the decisions of the last `decide`; often nothing."""
        ...


@runtime_checkable
class Closing(Protocol):
    """A controller that holds something open while a run lasts."""

    def close(self) -> None:
        """Let go of it; called once, at the run's end, however it ends."""
        ...

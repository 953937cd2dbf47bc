"""What the trainer asks of a backend: a host with seeds that can be trained."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from esper.artifacts import Artifact
from esper_functional import Event, SeedState

Place = tuple[int, int]
"""(layer row, seed)."""

ArrayTree = Mapping[str, Any]
"""Nested mappings of names to numpy arrays: what a checkpoint holds."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A loss (mean cross-entropy) and an accuracy in [0, 1] on one split."""

    loss: float
    accuracy: float
    health: Mapping[Place, float]
    """Health score of each running seed, in [0, 1], on that split."""


class Trainee(Protocol):
    """A host on one backend, its optimiser, and its seeds."""

    sites: tuple[str, ...]
    """Names of the layers with seeds, in the order of the seed state's rows."""

    @property
    def compilations(self) -> int:
        """Programs compiled so far; 0 for a backend that compiles none."""
        ...

    @property
    def seeds(self) -> SeedState:
        """The state of all seeds, in numpy."""
        ...

    def layer_shape(self, row: int) -> tuple[int, int]:
        """(in, out) features of a layer with seeds."""
        ...

    def prepare(self, event: Event, artifact: Artifact) -> None:
        """Begin, in the background, what an ACTIVATE event of a LOADING seed will need."""
        ...

    def apply(self, event: Event, artifact: Artifact | None = None) -> None:
        """Change a seed; ACTIVATE needs the artifact that it grafts."""
        ...

    def advance(self, step: int) -> None:
        """Bring ramps to `step`."""
        ...

    def step(self, indices: np.ndarray | None) -> Any:
        """One optimiser step on some training examples; returns the loss, on the device."""
        ...

    def read_losses(self, losses: Sequence[Any]) -> np.ndarray:
        """The losses of steps as f32; waits for the device once."""
        ...

    def absorb(self, step: int) -> list[Event]:
        """Bring failure counts into the seed state; returns the events that did."""
        ...

    def evaluate(self, split: str, muted: Collection[Place] = ()) -> Evaluation:
        """Loss and accuracy, as if the seeds in `muted` had alpha 0."""
        ...

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Class probabilities `[n, classes]` f32 for examples `[n, features]`."""
        ...

    def parameter_count(self) -> int:
        """Scalars of the host and of all running kernels."""
        ...

    def snapshot(self) -> ArrayTree:
        """Parameters, optimiser moments and seed state."""
        ...

    def restore(self, tree: ArrayTree, artifacts: Mapping[int, Artifact]) -> None:
        """Take over a snapshot; `artifacts` are those of the grafted kernels, by slot."""
        ...


def state_tree(state: SeedState) -> dict[str, np.ndarray]:
    """A seed state as a mapping of arrays."""
    return {f.name: np.asarray(getattr(state, f.name)) for f in dataclasses.fields(state)}


def tree_state(tree: Mapping[str, Any]) -> SeedState:
    """The seed state of such a mapping."""
    return SeedState(**{name: np.asarray(array) for name, array in tree.items()})


def muted_state(state: SeedState, muted: Collection[Place]) -> SeedState:
    """The state with some alphas at 0, for measuring what kernels are worth."""
    if not muted:
        return state
    alpha = np.array(state.alpha)
    for place in muted:
        alpha[place] = 0.0
    return state.replace(alpha=alpha)

"""What the trainer asks of a backend: a host with seeds that can be trained."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from esper.artifacts import Artifact
from esper.contracts import KernelSignature
from esper.tamiyo import Cost, Probe, SiteNorms
from esper.tamiyo.graph import Topology
from esper.tolaria.tasks import Batch
from esper_functional import Event, SeedState

Place = tuple[int, int]
"""(layer row, seed)."""

ArrayTree = Mapping[str, Any]
"""Nested mappings of names to numpy arrays: what a checkpoint holds."""

Params = Mapping[str, np.ndarray]
"""A kernel's parameters by their names in the artifact."""


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How parameters train, on either backend. Moments are kept for host and kernels apart.

    The learning rate is no part of it: it comes with every step, so that schedules are data.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.0
    """Of sgd, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled (Loshchilov and Hutter, 2019), of adamw and sgd: p <- p - rate · decay · p."""
    clip_norm: float | None = None
    """Largest global norm of the host's gradient, and of each kernel's by itself: so a graft
    leaves the host's clipping as it was."""
    accumulate: int = 1
    """Parts, equal in size, that a batch is computed in; their gradients are averaged."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of forward and backward passes; parameters and moments are float32 in any case."""
    ema_decay: float | None = None
    """Of an exponential moving average of all parameters, by which the network is then judged;
    a kernel's begins with its first parameters."""


class Rates(NamedTuple):
    """The learning rates of one step."""

    host: float
    kernels: Mapping[int, float]
    """By slot, of kernels whose rate is another than the host's, as while they warm up."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A mean loss and an accuracy in [0, 1] on one split; NaN accuracy for regression."""

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

    @property
    def topology(self) -> Topology:
        """Which site feeds which, as the host trains; grafts do not change it."""
        ...

    def signature(self, row: int) -> KernelSignature:
        """What a kernel must take and give at a layer with seeds.

        Raises:
            InputError: for a layer whose shapes no kernel can be compiled for.
        """
        ...

    def cost(self, kernels: Sequence[Artifact] = ()) -> Cost:
        """Of host and running kernels, and of `kernels` that are to come."""
        ...

    def prepare(self, event: Event, artifact: Artifact, *, incubate: bool = False) -> None:
        """Begin, in the background, what an ACTIVATE event of a LOADING seed will need.

        Args:
            incubate: whether an INCUBATE event follows at once.
        """
        ...

    def apply(
        self, event: Event, artifact: Artifact | None = None, params: Params | None = None
    ) -> None:
        """Change a seed; ACTIVATE needs the artifact that it grafts.

        Args:
            params: the kernel's first parameters, where they are others than the artifact's.
        """
        ...

    def advance(self, step: int) -> None:
        """Bring ramps to `step`."""
        ...

    def step(self, batch: np.ndarray | Batch | None, rates: Rates, step: int) -> Any:
        """One optimiser step; returns the loss, on the device.

        Args:
            batch: i32 indices of training examples, other examples, or None for all.
            step: by which random numbers are drawn.
        """
        ...

    def train(
        self,
        batches: Callable[[int], np.ndarray | Batch | None],
        rates: Sequence[Rates],
        first: int,
        after: Callable[[int, Any], bool],
    ) -> list[Any]:
        """Steps from `first` on, one by one, each as `step` takes it.

        All that is the same for each of them is done once: on a CPU, a few microseconds of Python
        between the steps of a small network are a part of its time that can be seen.

        Args:
            batches: of a step, by its number.
            rates: of each step, in order; best the same object where they are the same.
            after: is told each step and its loss; where it says so, that was the last.

        Returns:
            The losses of those that were taken.
        """
        ...

    @property
    def at_once(self) -> int:
        """How many steps are best trained in one call now; 1 where nothing is gained by more."""
        ...

    def steps(
        self, batches: Sequence[np.ndarray | Batch | None], rates: Sequence[Rates], step: int
    ) -> list[Any]:
        """`at_once` steps, to the last bit as `step` trains them one after the other.

        Args:
            batches: indices of equally many examples each, or None for all in each.
            step: the first.

        Returns:
            Losses on the device, for `read_losses`.
        """
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

    def losses_without(
        self, split: str, variants: Sequence[Collection[Place]], *, parts: int = 1
    ) -> np.ndarray:
        """Mean losses with the seeds of each variant at alpha 0, all variants in one batched pass.

        Args:
            parts: how many parts the split is dealt out to, example by example, as cards are: data
                may lie in order, by class say, and each part is to be like the whole.

        Returns:
            f32 `[variants, parts]`; fewer parts where there are fewer examples.
        """
        ...

    @property
    def probed(self) -> Sequence[int]:
        """Rows of the layers that can be probed: those that the host calls once in a pass."""
        ...

    def probe(self, row: int, indices: np.ndarray) -> Probe:
        """What a layer sees on training examples `indices`; changes nothing."""
        ...

    def probes(self, rows: Sequence[int], indices: np.ndarray) -> Mapping[int, Probe]:
        """What several layers see, in one pass."""
        ...

    def norms(self, indices: np.ndarray) -> SiteNorms:
        """Norms of gradient and parameters at each site, on training examples `indices`.

        Of the network as it is judged, in the precision of the run. Both come from the device
        in one transfer; nothing is changed.
        """
        ...

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The network's outputs `[n, ...]` f32 (class probabilities for cross-entropy)."""
        ...

    def hold(self) -> Any:
        """All of the trainee as it is now, kept in memory; later steps leave it as it is."""
        ...

    def take_back(self, held: Any) -> None:
        """Be again what `hold` kept, which may be taken back to again."""
        ...

    def snapshot(self, held: Any | None = None) -> ArrayTree:
        """All that training goes on from, as numpy arrays that later steps leave as they are.

        Parameters, moments, averages, the model's own state, random numbers and seeds.

        Args:
            held: what `hold` kept; None for now.
        """
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


def part_means(losses: np.ndarray, parts: int) -> np.ndarray:
    """Means f32 `[variants, parts]` of losses `[variants, examples]`, dealt out to parts."""
    count = max(1, min(parts, losses.shape[1]))
    means = [losses[:, part::count].mean(axis=1, dtype=np.float64) for part in range(count)]
    return np.stack(means, axis=1).astype(np.float32)

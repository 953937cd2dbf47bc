"""A host on torch in training: any module, with seeds in its layers."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from esper.artifacts import Artifact
from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.execution import load_torch_kernel
from esper.tamiyo import Cost, Probe, SiteNorms
from esper.tamiyo.graph import Topology
from esper.tezzeret import artifact_cost
from esper.tolaria import _torch_held, _torch_measure
from esper.tolaria._outputs import check_outputs
from esper.tolaria._torch_data import Examples, Objective, TaskData
from esper.tolaria._torch_held import Held
from esper.tolaria._torch_network import TorchNetwork
from esper.tolaria._torch_norms import site_norms
from esper.tolaria._torch_optimiser import HOST, GroupedOptimiser
from esper.tolaria._torch_probe import probes
from esper.tolaria._torch_random import NOTHING, random_stream
from esper.tolaria._torch_survey import Site, site_signature, survey
from esper.tolaria._trainee import (
    ArrayTree,
    Batch,
    Evaluation,
    Optimisation,
    Params,
    Place,
    Rates,
    part_means,
)
from esper_functional import Event, EventKind, SeedState, running_seeds

if TYPE_CHECKING:
    from esper.tolaria.tasks import Task


class TorchTrainee:
    """See `Trainee`.

    Optimisers are torch's fused ones on every device. bfloat16 is by autocast, with parameters in
    float32. A host that draws random numbers draws them by seed and step; torch's own random state
    is never changed.

    Args:
        seed: of the host's first parameters, and of what it draws.
        seeds_per_layer: how many kernels each layer can carry.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        grow_at: paths of layers that carry seeds besides all linear ones; by default the host's
            own.
        evaluation_batch: most examples of one forward pass without gradients, variants counted;
            None for a whole part, and all variants, at once.
        threads: of torch, in this process; None leaves them as they are.

    Raises:
        InputError: for an optimisation that torch's optimisers do not have, or a host that does
            not take a batch and return one tensor that is for the task's labels.
        SeedIndexError: where `grow_at` names a layer that is not there.
    """

    def __init__(
        self,
        task: "Task",
        *,
        seed: int,
        seeds_per_layer: int,
        blend: str,
        isolate: bool = False,
        grow_at: Sequence[str] = (),
        optimisation: Optimisation | None = None,
        evaluation_batch: int | None = None,
        threads: int | None = None,
    ) -> None:
        chosen = Optimisation() if optimisation is None else optimisation
        if threads is not None:
            torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._seed = seed
        self._accumulate = chosen.accumulate
        self._evaluation_batch = evaluation_batch
        self._objective = Objective(task.loss)
        with random_stream(device, seed, 0):
            # Of a user's own function, which may draw without saying from what.
            host = task.host.torch(seed)
        if not isinstance(host, torch.nn.Module):
            raise InputError(
                f"the host {task.host.name!r} builds a {type(host).__name__} for torch: expected a"
                " torch.nn.Module"
            )
        self._network = TorchNetwork(
            host,
            grow_at=tuple(grow_at) or task.host.grow_at,
            seeds_per_layer=seeds_per_layer,
            blend=blend,
            isolate=isolate,
            precision=chosen.precision,
            device=device,
        )
        self._data = TaskData(task, device)
        self._optimiser = GroupedOptimiser(self._network.host, chosen)
        self.sites: tuple[str, ...] = tuple(self._network.table.names)
        first = self._data.inputs(np.array(task.train.x[:3]))
        self._survey = survey(self._network.model, self._network.layers, first)
        check_outputs(self._survey.outputs, task)
        self._costs: dict[str, Cost] = {}

    @property
    def compilations(self) -> int:
        """0: torch runs what it is told."""
        return 0

    @property
    def seeds(self) -> SeedState:
        """The state of all seeds, in numpy."""
        return self._network.seeds

    @property
    def topology(self) -> Topology:
        """See `Trainee.topology`."""
        return self._survey.topology

    def signature(self, row: int) -> KernelSignature:
        """See `Trainee.signature`."""
        return site_signature(self._network.layers[row], self._survey.sites[row])

    def cost(self, kernels: Sequence[Artifact] = ()) -> Cost:
        """See `Trainee.cost`; a kernel of vectors in a layer of sequences runs once a position."""
        network = self._network
        parameters = sum(p.numel() for p in network.host.values())
        flops = self._survey.flops
        run = [(row, network.slot(row, seed)) for row, seed in running_seeds(self.seeds)]
        running = [(network.grafts[slot].artifact, row) for row, slot in run]
        for artifact, row in [*running, *((own, None) for own in kernels)]:
            own = self._kernel_cost(artifact)
            parameters += own.parameters
            flops += own.flops * self._positions(artifact, row)
        return Cost(parameters, flops)

    def _kernel_cost(self, artifact: Artifact) -> Cost:
        if artifact.kernel_id not in self._costs:
            counted = artifact_cost(artifact)
            self._costs[artifact.kernel_id] = Cost(counted.parameter_count, float(counted.flops))
        return self._costs[artifact.kernel_id]

    def _positions(self, artifact: Artifact, row: int | None) -> int:
        """How often a kernel runs for one example: at its layer, or at the layer that it fits."""
        wanted = artifact.manifest.signature
        size = int(np.prod(wanted.input_shape))

        def fits(site: Site | str) -> bool:
            shape = () if isinstance(site, str) else site.input_shape
            return tuple(wanted.input_shape) in (shape, shape[-len(wanted.input_shape) :])

        rows = range(len(self.sites)) if row is None else [row]
        found = [
            int(np.prod(site.input_shape)) // size
            for site in (self._survey.sites[own] for own in rows)
            if isinstance(site, Site) and fits(site)
        ]
        return max(found, default=1)

    # How seeds change

    def prepare(self, event: Event, artifact: Artifact, *, incubate: bool = False) -> None:
        """Read the kernel's program, which is kept for when it is grafted."""
        load_torch_kernel(artifact)

    def apply(
        self, event: Event, artifact: Artifact | None = None, params: Params | None = None
    ) -> None:
        """See `Trainee.apply`.

        Raises:
            InputError: for an ACTIVATE event without an artifact, or parameters that do not fit.
        """
        network, slot = self._network, self._network.slot(event.layer, event.seed)
        averages = self._optimiser.groups[HOST].averages
        if event.kind is EventKind.FOSSILIZE and network.trains(slot):
            self._optimiser.settle(slot)
        folds = event.kind is EventKind.FOLD and bool(averages)
        before = {name: p.detach().clone() for name, p in network.host.items()} if folds else {}
        network.apply(event, artifact, params)
        if event.kind is EventKind.ACTIVATE:
            self._optimiser.adopt(slot, network.kernel_params(slot))
        elif not network.trains(slot):
            self._optimiser.forget(slot)
        for name, average in averages.items() if folds else ():
            # The host's weights jumped by the kernel's, and their average with them.
            average += network.host[name].detach() - before[name]

    def advance(self, step: int) -> None:
        """See `Trainee.advance`."""
        self._network.advance(step)

    def absorb(self, step: int) -> list[Event]:
        """See `Trainee.absorb`."""
        events = self._network.absorb(step)
        for event in events:
            slot = self._network.slot(event.layer, event.seed)
            if not self._network.trains(slot):
                self._optimiser.forget(slot)
        return events

    # How it trains

    def step(self, batch: np.ndarray | Batch | None, rates: Rates, step: int) -> Any:
        """See `Trainee.step`.

        Raises:
            InputError: for a batch that cannot be divided into equal parts.
        """
        return self.train(lambda _: batch, [rates], step, lambda *_: True)[0]

    def train(
        self,
        batches: Callable[[int], np.ndarray | Batch | None],
        rates: Sequence[Rates],
        first: int,
        after: Callable[[int, Any], bool],
    ) -> list[Any]:
        """See `Trainee.train`.

        Raises:
            InputError: for a batch that cannot be divided into equal parts.
        """
        optimiser, examples_of, drawn = self._optimiser, self._data.batch, self._survey.random
        losses: list[Any] = []
        self._network.train(True)
        loss_of = self._accumulated if self._accumulate > 1 else self._whole
        shadows, set_rates = self._network.incubates, None
        for step, own in enumerate(rates, first):
            if own is not set_rates:
                optimiser.set_rates(own)
                set_rates = own
            examples = examples_of(batches(step))
            optimiser.zero_grad()
            if drawn:
                with random_stream(self._network.device, self._seed, 1, step):
                    loss = loss_of(examples, shadows)
            else:
                loss = loss_of(examples, shadows)
            optimiser.update()
            losses.append(loss)
            if after(step, loss):
                break
        return losses

    def _random(self, *words: int) -> contextlib.AbstractContextManager[None]:
        if not self._survey.random:
            return NOTHING
        return random_stream(self._network.device, self._seed, *words)

    def _accumulated(self, examples: Examples, shadows: bool) -> Tensor:
        """The mean loss of a batch, with its gradients added to the parameters'."""
        parts, count = self._accumulate, len(examples.y)
        if count % parts:
            raise InputError(
                f"a batch of {count} examples cannot be accumulated in {parts} equal parts: choose"
                f" a batch size that {parts} divides, or another `accumulate`"
            )
        size = count // parts
        chunks = [
            Examples(examples.x[i : i + size], examples.y[i : i + size])
            for i in range(0, count, size)
        ]
        losses = self._network.counted_once(
            parts, lambda part: self._whole(chunks[part], shadows, parts)
        )
        return torch.stack(losses).sum()

    def _whole(self, examples: Examples, shadows: bool, parts: int = 1) -> Tensor:
        """The mean loss of examples divided by `parts`, with its gradients added."""
        network, (x, y) = self._network, examples
        if network.casts:
            with network.precision():
                loss = self._objective.loss(network.model(x), y)
        else:
            loss = self._objective.loss(network.model(x), y)
        share = loss if parts == 1 else loss / parts
        share.backward()
        if shadows:
            with network.precision():
                hidden = [self._objective.loss(own, y) / parts for own in network.shadow(x)]
            for own in hidden:
                own.backward()
        return share.detach()

    @property
    def at_once(self) -> int:
        """See `Trainee.at_once`."""
        return 1

    def steps(
        self, batches: Sequence[np.ndarray | Batch | None], rates: Sequence[Rates], step: int
    ) -> list[Any]:
        """See `Trainee.steps`."""
        pairs = enumerate(zip(batches, rates, strict=True), step)
        return [self.step(batch, own, i) for i, (batch, own) in pairs]

    def read_losses(self, losses: Sequence[Any]) -> np.ndarray:
        """See `Trainee.read_losses`."""
        if not losses:
            return np.zeros(0, np.float32)
        rows = [torch.as_tensor(loss, device=self._network.device) for loss in losses]
        return torch.stack(rows).float().cpu().numpy()

    # How it is judged

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """Evaluation mode, without gradients, by the averages where there are any."""
        self._network.train(False)
        with (
            torch.no_grad(),
            self._random(2),
            self._network.precision(),
            self._optimiser.averaged(),
        ):
            yield

    def evaluate(self, split: str, muted: Collection[Place] = ()) -> Evaluation:
        """See `Trainee.evaluate`; health is of the kernels that are blended."""
        with self._judged(), self._network.muted(muted):
            return _torch_measure.evaluate(
                self._network, self._data, self._objective, split, self._evaluation_batch
            )

    def losses_without(
        self, split: str, variants: Sequence[Collection[Place]], *, parts: int = 1
    ) -> np.ndarray:
        """See `Trainee.losses_without`."""
        with self._judged():
            losses = _torch_measure.losses_without(
                self._network, self._data, self._objective, split, self._evaluation_batch, variants
            )
        return part_means(losses, parts)

    @property
    def probed(self) -> Sequence[int]:
        return [row for row, site in self._survey.sites.items() if not isinstance(site, str)]

    def probe(self, row: int, indices: np.ndarray) -> Probe:
        """See `Trainee.probe`.

        Raises:
            InputError: for a layer that the host does not call once in a pass.
        """
        return self.probes([row], indices)[row]

    def probes(self, rows: Sequence[int], indices: np.ndarray) -> dict[int, Probe]:
        """See `Trainee.probes`; of the network as it is judged, in float32.

        Raises:
            InputError: for a layer that the host does not call once in a pass.
        """
        self._network.train(False)
        examples = self._data.batch(indices)
        sites = {row: self._survey.sites[row] for row in rows}
        with self._random(3), self._optimiser.averaged():
            return probes(self._network, self._objective, sites, examples)

    def norms(self, indices: np.ndarray) -> SiteNorms:
        """See `Trainee.norms`; parameters that are frozen have no gradient."""
        self._network.train(False)
        examples = self._data.batch(indices)
        with self._random(3), self._network.precision(), self._optimiser.averaged():
            return site_norms(self._network, self._objective, examples)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """See `Trainee.predict`."""
        size = self._evaluation_batch or max(1, len(x))
        with self._judged():
            rows = [
                self._objective.predictions(self._network.model(self._data.inputs(x[i : i + size])))
                for i in range(0, max(1, len(x)), size)
            ]
            return torch.cat(rows).cpu().numpy()

    # How it is kept

    def hold(self) -> Held:
        """See `Trainee.hold`."""
        return _torch_held.hold(self._network, self._optimiser)

    def take_back(self, held: Held) -> None:
        """See `Trainee.take_back`."""
        _torch_held.take_back(held, self._network, self._optimiser)

    def snapshot(self, held: Held | None = None) -> ArrayTree:
        """See `Trainee.snapshot`."""
        return _torch_held.snapshot(self.hold() if held is None else held)

    def restore(self, tree: ArrayTree, artifacts: Mapping[int, Artifact]) -> None:
        """See `Trainee.restore`.

        Raises:
            InputError: for a snapshot of another host, or of kernels without their artifacts;
                nothing is changed.
            ArtifactError: for an artifact that is refused; nothing is changed.
        """
        self.take_back(_torch_held.read_snapshot(tree, artifacts, self._network))

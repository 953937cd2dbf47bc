"""A host on jax, wrapped with seeds and trained in its flat form."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.artifacts import Artifact
from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tamiyo import Cost, Probe, SiteNorms
from esper.tamiyo.graph import Topology
from esper.tezzeret import artifact_cost
from esper.tolaria._jax_data import JaxData, StepExamples
from esper.tolaria._jax_fold import fold_kernel, with_average
from esper.tolaria._jax_held import (
    Arranged,
    Held,
    arrange,
    failures,
    kernel_of,
    read_snapshot,
    reweighted,
    snapshot,
    widened,
)
from esper.tolaria._jax_programs import (
    PROGRAMS,
    Design,
    Group,
    ProgramKey,
    build_static,
    host_flops,
    kernel_group,
    merge_params,
    new_group,
    with_params,
)
from esper.tolaria._jax_stretch import AT_ONCE, Exactness, Stillness
from esper.tolaria._outputs import check_outputs
from esper.tolaria._trainee import (
    ArrayTree,
    Batch,
    Evaluation,
    Optimisation,
    Params,
    Place,
    Rates,
    muted_state,
    part_means,
)
from esper.tolaria.tasks import Task
from esper_adapters.equinox import SeededModel
from esper_functional import (
    Event,
    EventKind,
    Kernel,
    Live,
    Plan,
    SeedLifecycleState,
    SeedState,
    Weights,
    advance,
    count_params,
    fault_events,
    gather_weights,
    running_seeds,
)

VARIANTS = 16
"""Most variants of one pass that measures worth; more are measured in several passes."""

_UNSEEN = (EventKind.LOAD, EventKind.HEALTH)
"""Events that no program sees anything of."""

EXACT = Exactness()
"""Of all programs in the process."""


class JaxTrainee:
    """See `Trainee`.

    Programs are compiled for each plan and shape of a batch, and shared by all runs in the
    process. bfloat16 is of everything in a pass, kernels included, with parameters, moments and
    losses in float32. A host that draws random numbers draws them by seed and step, or carries
    their state.

    Args:
        seed: of the host's first parameters, and of what it draws.
        seeds_per_layer: how many kernels each layer can carry.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        grow_at: paths of layers that carry seeds besides all linear ones; by default the host's
            own.
        evaluation_batch: most examples of one forward pass without gradients, variants counted;
            None for a whole part, and up to 16 variants, at once, but for 1024 examples of a part
            that lies in a mapped file.

    Raises:
        InputError: for an optimisation that there is none of, or a host that does not return one
            array that is for the task's labels.
        SeedIndexError: where `grow_at` names a layer that is not there.
    """

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        seeds_per_layer: int,
        blend: str,
        isolate: bool = False,
        grow_at: Sequence[str] = (),
        optimisation: Optimisation | None = None,
        evaluation_batch: int | None = None,
    ) -> None:
        self._how = optimisation or Optimisation()
        x = task.train.x
        self._design = Design(
            task.host, task.loss, seeds_per_layer, blend, isolate,
            tuple(grow_at) or task.host.grow_at, x.shape[1:], str(x.dtype), self._how,
        )  # fmt: skip
        self._static = build_static(self._design)
        network = self._static.network
        check_outputs(network.survey.outputs, task)
        self._model = network.model
        params, self._rest = network.first(task.host, seed)
        self._host = new_group(self._static, self._how, params)
        self._seed = seed
        self._groups: dict[int, Group] = {}
        """Of the kernels that train, by slot; those in `now` are ahead of them."""
        self._flops: dict[int, int] = {}
        """Of one example, of every grafted kernel, by slot."""
        self._data = JaxData(task, evaluation_batch)
        self._chunk = evaluation_batch
        self._last_batch: np.ndarray | Batch | None = None
        self._running: tuple[Plan, Any, Any] | None = None
        """The program of the last step: its plan, its batch's shape, and itself."""
        self._rates: tuple[Any, Any] | None = None
        self._now = arrange(self._model, self._groups)
        self.sites: tuple[str, ...] = self._model.sites
        self._first_compilation = PROGRAMS.compilations
        self._host_flops = host_flops(self._design)
        self._still = Stillness()

    @property
    def seeds(self) -> SeedState:
        return self._model.seeds

    @property
    def compilations(self) -> int:
        return PROGRAMS.compilations - self._first_compilation

    def _key(self, kind: str, plan: Plan, sites: tuple[str, ...] = ()) -> ProgramKey:
        return ProgramKey(kind, self._design, plan, sites)

    @property
    def topology(self) -> Topology:
        return self._static.network.topology

    def signature(self, row: int) -> KernelSignature:
        return self._static.network.signature(self.sites[row])

    def cost(self, kernels: Sequence[Artifact] = ()) -> Cost:
        flops, survey = self._host_flops, self._static.network.survey
        for row, seed in running_seeds(self.seeds):
            slot = int(self.seeds.slot[row, seed])
            rank = self._model.kernels[slot].program.example_rank
            flops += self._flops[slot] * survey.positions([self.sites[row]], rank)
        parameters = self.parameter_count()
        for artifact in kernels:
            own, shape = artifact_cost(artifact), artifact.manifest.signature.input_shape
            parameters += own.parameter_count
            flops += own.flops * survey.positions(self.sites, len(shape), tuple(shape))
        return Cost(parameters, float(flops))

    def parameter_count(self) -> int:
        """Scalars of the host and of all running kernels."""
        trained = [group.params for group in self._now.trained]
        return count_params((self._host.params, trained, self._now.fossils))

    # How seeds change.

    def _settle(self) -> None:
        """Put trained kernels back by slot, before a seed changes."""
        kernels = dict(self._model.kernels)
        for slot, group in zip(self._now.active, self._now.trained, strict=True):
            kernels[slot] = Kernel(kernels[slot].program, group.params)
            self._groups[slot] = group
        self._model = dataclasses.replace(self._model, kernels=kernels)

    def _grafted(
        self, event: Event, artifact: Artifact, params: Params | None
    ) -> tuple[SeededModel, dict[int, Group]]:
        kernel = kernel_of(artifact, params)
        model = self._model.apply_event(event, kernel)
        slot = int(model.seeds.slot[event.layer, event.seed])
        own = kernel_group(self._static, self._how, widened(kernel.params))
        return model, {**self._groups, slot: own}

    def prepare(self, event: Event, artifact: Artifact, *, incubate: bool = False) -> None:
        self._settle()
        model, groups = self._grafted(event, artifact, None)
        coming = arrange(model, groups)
        x, y = next(self._data.chunks("validation", self._data.chunk_size("validation")))
        own = merge_params(coming.plan, [g.params for g in coming.trained], coming.fossils)
        arguments = (self._host.params, with_params(coming.live, own), self._rest, x, y)
        PROGRAMS.prepare(self._key("evaluate", coming.plan), *arguments)
        if incubate:
            hidden = Event(event.step, event.layer, event.seed, EventKind.INCUBATE)
            coming = arrange(model.apply_event(hidden), groups)
        examples = self._data.step(self._last_batch)
        arguments = self._step_arguments(coming, examples, Rates(1.0, {}), event.step)
        PROGRAMS.prepare(self._key("step", coming.plan), *arguments)

    def apply(
        self, event: Event, artifact: Artifact | None = None, params: Params | None = None
    ) -> None:
        if event.kind in _UNSEEN:
            self._model = _without_events(self._model.apply_event(event))
            self.advance(event.step)
            return
        self._settle()
        place, before = (event.layer, event.seed), self.seeds
        counts, slot = failures(self._now), int(before.slot[place])
        group = self._groups.get(slot)
        if event.kind is EventKind.ACTIVATE:
            if artifact is None:
                where = f"layer {self.sites[event.layer]!r}, seed {event.seed}"
                raise InputError(
                    f"an ACTIVATE event of {where}, came without the artifact that it grafts: pass"
                    " `artifact`"
                )
            self._model, self._groups = self._grafted(event, artifact, params)
            self._flops[slot] = artifact_cost(artifact).flops
        elif event.kind is EventKind.FOLD:
            combine = self._static.network.training.combine
            self._model, self._host = fold_kernel(
                event, self._model, combine, self._host, self._rest, group
            )
        else:
            fossilizes = event.kind is EventKind.FOSSILIZE
            model = with_average(self._model, slot, group) if fossilizes else self._model
            self._model = model.apply_event(event)
        if int(self.seeds.stage[place]) != SeedLifecycleState.ACTIVE:
            self._groups.pop(slot, None)
        if self.seeds.error_count[place] != before.error_count[place]:
            counts.pop(slot, None)
        self._model = _without_events(self._model)
        self._now = arrange(self._model, self._groups, counts)
        self._still.changed()

    def advance(self, step: int) -> None:
        if not np.asarray(self.seeds.ramp_span).any():
            return
        self._model = dataclasses.replace(self._model, seeds=advance(self.seeds, step))
        self._now = self._now._replace(live=reweighted(self._now, self.seeds))

    # Training.

    def _rate_array(self, now: Arranged, rates: Rates) -> Any:
        wanted = _rates_of(now, rates)
        if self._rates is None or self._rates[0] != wanted:
            self._rates = (wanted, jnp.asarray(np.array(wanted, np.float32)))
        return self._rates[1]

    def _step_arguments(
        self, now: Arranged, examples: StepExamples, rates: Rates, step: int
    ) -> tuple[Any, ...]:
        key = None
        if self._static.network.keyed:
            key = np.array([self._seed, step], np.int32)
        own = self._rate_array(now, rates)
        return (
            self._host, now.trained, now.fossils, now.live, self._rest, *examples, own, key,
        )  # fmt: skip

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
        losses, now, examples_of = list[Any](), self._now, self._data.step
        host, trained, live, rest = self._host, now.trained, now.live, self._rest
        keyed, batch, key = self._static.network.keyed, None, None
        rate, own, shapes = None, None, None
        program: Any = None
        try:
            for step, wanted in enumerate(rates, first):
                batch = batches(step)
                x, y, indices = examples = examples_of(batch)
                if wanted is not rate:
                    rate, own = wanted, self._rate_array(now, wanted)
                if keyed:
                    key = np.array([self._seed, step], np.int32)
                if (found := examples.shapes) != shapes:
                    shapes = found
                    arguments = host, trained, now.fossils, live, rest, x, y, indices, own, key
                    program = self._program_of(examples, arguments)
                host, trained, errors, rest, loss = program(
                    host, trained, now.fossils, live, rest, x, y, indices, own, key
                )
                if live is not None:
                    live = dataclasses.replace(live, errors=errors)
                losses.append(loss)
                if after(step, loss):
                    break
        finally:
            self._host, self._rest, self._last_batch = host, rest, batch
            self._now = now._replace(trained=trained, live=live)
            self._still.stepped(len(losses))
        return losses

    def _program_of(self, examples: StepExamples, arguments: tuple[Any, ...]) -> Any:
        """The program of a step on examples of such shapes."""
        count, parts = examples.size, self._how.accumulate
        if count % parts:
            raise InputError(
                f"a batch of {count} examples cannot be accumulated in {parts} equal parts: choose"
                f" a batch size that {parts} divides, or another `accumulate`"
            )
        plan, shapes = self._now.plan, examples.shapes
        if self._running is None or self._running[0] is not plan or self._running[1] != shapes:
            program = PROGRAMS.get(self._key("step", plan), *arguments)
            self._running = (plan, shapes, program)
        return self._running[2]

    def _take(self, result: tuple[Any, ...]) -> Any:
        """Be what a program of steps gave; returns its losses."""
        now = self._now
        self._host, trained, errors, self._rest, loss = result
        live = None if now.live is None else dataclasses.replace(now.live, errors=errors)
        self._now = now._replace(trained=trained, live=live)
        return loss

    @property
    def at_once(self) -> int:
        if not self._still.long or isinstance(self._last_batch, Batch):
            return 1
        shapes = None if self._running is None else self._running[1]
        inexact = EXACT.known((self._key("steps", self._now.plan), shapes)) is False
        if inexact or not self._data.held("train"):
            self._still.changed()  # so that it is not asked again before every step
            return 1
        return AT_ONCE

    def steps(
        self, batches: Sequence[np.ndarray | Batch | None], rates: Sequence[Rates], step: int
    ) -> list[Any]:
        now, key = self._now, self._key("steps", self._now.plan)
        # XLA may do with arrays of other shapes otherwise.
        own = (key, self._data.step(batches[0]).shapes)
        drawn = [batch for batch in batches if isinstance(batch, np.ndarray)]
        examples = self._data.step(np.stack(drawn) if drawn else None)
        keys = None
        if self._static.network.keyed:
            keys = np.array([[self._seed, step + i] for i in range(len(batches))], np.int32)
        table = np.array([_rates_of(now, rate) for rate in rates], np.float32)
        arguments = (
            self._host, now.trained, now.fossils, now.live, self._rest, *examples, table, keys,
        )  # fmt: skip
        result = PROGRAMS.get(key, *arguments)(*arguments)
        if EXACT.known(own):
            return [self._take(result)]
        # What single steps give is what counts; the program may do the next ones, if it can.
        each = enumerate(zip(batches, rates, strict=True), step)
        losses = [self.step(batch, rate, i) for i, (batch, rate) in each]
        errors = None if self._now.live is None else self._now.live.errors
        one_by_one = (self._host, self._now.trained, errors, self._rest, jnp.stack(losses))
        EXACT.compare(own, result, one_by_one)
        return losses

    def read_losses(self, losses: Sequence[Any]) -> np.ndarray:
        # One program for every length would be compiled; the transfers are small.
        read = [np.ravel(loss) for loss in jax.device_get(list(losses))]
        return np.concatenate([np.zeros(0, np.float32), *read]).astype(np.float32)

    def absorb(self, step: int) -> list[Event]:
        if self._now.live is None:
            return []
        events = fault_events(self.seeds, self._now.live.errors, step=step)
        for event in events:
            self.apply(event)
        return events

    # Judging.

    def _judged_host(self) -> Any:
        return self._host.params if self._host.average is None else self._host.average

    def _judged_live(self, now: Arranged, seeds: SeedState) -> Live | None:
        own = [g.params if g.average is None else g.average for g in now.trained]
        return with_params(reweighted(now, seeds), merge_params(now.plan, own, now.fossils))

    def evaluate(self, split: str, muted: Collection[Place] = ()) -> Evaluation:
        size = self._data.chunk_size(split)
        live = self._judged_live(self._now, muted_state(self.seeds, muted))
        key, host = self._key("evaluate", self._now.plan), self._judged_host()
        rows, sizes = [], []
        for x, y in self._data.chunks(split, size):
            rows.append(np.asarray(PROGRAMS(key, host, live, self._rest, x, y)))
            sizes.append(len(y))
        loss, accuracy, *health = (
            float(v) for v in (rows[0] if len(rows) == 1 else np.average(rows, 0, sizes))
        )
        # What incubates has no part in this pass, and no output in it.
        hidden = np.asarray(self.seeds.incubating)
        seen = [place for place in running_seeds(self.seeds) if not hidden[place]]
        return Evaluation(loss, accuracy, dict(zip(seen, health, strict=True)))

    def losses_without(
        self, split: str, variants: Sequence[Collection[Place]], *, parts: int = 1
    ) -> np.ndarray:
        now = self._now
        if now.live is None:
            whole = self._per_example(split, None, [()])
            each = np.repeat(whole, len(variants), axis=0)
        else:
            live = self._judged_live(now, self.seeds)
            groups = [variants[i : i + VARIANTS] for i in range(0, len(variants), VARIANTS)]
            groups = groups or [[()]]
            each = np.concatenate([self._per_example(split, live, group) for group in groups])
        return part_means(each[: len(variants)], parts)

    def _per_example(
        self, split: str, live: Live | None, variants: Sequence[Collection[Place]]
    ) -> np.ndarray:
        """f64 losses `[variants, examples]`."""
        now = self._now
        weights = [gather_weights(muted_state(self.seeds, own), now.plan) for own in variants]
        # As many as there are places and one more, or a full pass: so few programs do for all.
        size = 1 if live is None else min(VARIANTS, max(len(weights), len(now.plan.runs) + 1))
        weights += [weights[-1]] * (size - len(weights))
        stacked = Weights(*(np.stack(column) for column in zip(*weights, strict=True)))
        key, host = self._key("variants", now.plan), self._judged_host()
        rows = [
            np.asarray(PROGRAMS(key, host, live, self._rest, stacked, x, y))
            for x, y in self._data.chunks(split, self._data.chunk_size(split, size))
        ]
        return np.concatenate(rows, axis=1)[: len(variants)].astype(np.float64)

    @property
    def probed(self) -> Sequence[int]:
        known = self._static.network.survey.sites
        return [row for row, name in enumerate(self.sites) if not isinstance(known[name], str)]

    def probe(self, row: int, indices: np.ndarray) -> Probe:
        """See `Trainee.probe`.

        Raises:
            InputError: for a layer that the host does not call once in a pass.
        """
        return self.probes([row], indices)[row]

    def probes(self, rows: Sequence[int], indices: np.ndarray) -> dict[int, Probe]:
        """See `Trainee.probes`; of the network as it is judged, in the precision of the run.

        Raises:
            InputError: for a layer that the host does not call once in a pass.
        """
        names = tuple(self.sites[row] for row in rows)
        for name in names:
            self._static.network.probed(name)
        x, y = self._data.rows(indices)
        live = self._judged_live(self._now, self.seeds)
        key = self._key("probe", self._now.plan, names)
        loss, seen = PROGRAMS(key, self._judged_host(), live, self._rest, x, y)
        found: dict[int, Probe] = {}
        for row, own in zip(rows, seen, strict=True):
            inputs, outputs, gradients = (np.asarray(array, np.float32) for array in own)
            found[row] = Probe(inputs, outputs, gradients, float(loss))
        return found

    def norms(self, indices: np.ndarray) -> SiteNorms:
        x, y = self._data.rows(indices)
        live = self._judged_live(self._now, self.seeds)
        key = self._key("norms", self._now.plan)
        both = np.asarray(PROGRAMS(key, self._judged_host(), live, self._rest, x, y), np.float32)
        return SiteNorms(both[0], both[1])

    def predict(self, x: np.ndarray) -> np.ndarray:
        live, host = self._judged_live(self._now, self.seeds), self._judged_host()
        key, size = self._key("predict", self._now.plan), self._chunk or max(1, len(x))
        parts = (jnp.asarray(x[i : i + size]) for i in range(0, max(1, len(x)), size))
        return np.concatenate(
            [np.asarray(PROGRAMS(key, host, live, self._rest, part)) for part in parts]
        )

    # What is kept of it.

    def hold(self) -> Held:
        self._settle()
        return Held(
            self._host, self._rest, self._model, dict(self._groups), dict(self._flops), self._now
        )

    def take_back(self, held: Held) -> None:
        self._host, self._rest, self._model = held.host, held.rest, held.model
        self._groups, self._flops = dict(held.groups), dict(held.flops)
        self._now = held.now
        self._still.changed()

    def snapshot(self, held: Held | None = None) -> ArrayTree:
        return snapshot(self.hold() if held is None else held)

    def restore(self, tree: ArrayTree, artifacts: Mapping[int, Artifact]) -> None:
        """See `Trainee.restore`.

        Raises:
            InputError: for a snapshot of another host, or of kernels without their artifacts;
                nothing is changed.
            ArtifactError: for an artifact that is refused; nothing is changed.
        """
        self.take_back(read_snapshot(tree, artifacts, self.hold(), self._static, self._how))


def _without_events(model: SeededModel) -> SeededModel:
    """What a run records is in its ledger; a copy of all of it for each event grows with it."""
    return dataclasses.replace(model, events=())


def _rates_of(now: Arranged, rates: Rates) -> tuple[float, ...]:
    """Of the host, and of the kernels that train, in plan order."""
    return (rates.host, *(rates.kernels.get(slot, rates.host) for slot in now.active))

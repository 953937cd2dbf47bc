"""A host on jax: an Equinox MLP wrapped with seeds, trained in its flat form."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper.artifacts import Artifact
from esper.execution import load_jax_kernel
from esper.tolaria._jax_programs import (
    PROGRAMS,
    ProgramKey,
    Shape,
    build_static,
    merge_params,
    with_params,
)
from esper.tolaria._tasks import Task, initial_host
from esper.tolaria._trainee import (
    ArrayTree,
    Evaluation,
    Place,
    muted_state,
    state_tree,
    tree_state,
)
from esper_adapters.equinox import SeededModel
from esper_functional import (
    Event,
    EventKind,
    Kernel,
    Live,
    Plan,
    SeedLifecycleState,
    SeedState,
    advance,
    count_params,
    fault_events,
    gather,
    gather_weights,
    running_seeds,
)


def _named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }


def _unnamed(template: Any, named: Mapping[str, Any]) -> Any:
    def pick(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jnp.asarray(named[name], dtype=jnp.asarray(leaf).dtype)

    return jax.tree_util.tree_map_with_path(pick, template)


class _Arranged(NamedTuple):
    """What a plan needs, picked from the model: the running kernels by role."""

    plan: Plan
    active: tuple[int, ...]
    """Slots of the kernels that train, in plan order."""
    trained: tuple[Any, ...]
    moments: tuple[Any, ...]
    fossils: tuple[Any, ...]
    live: Live | None
    """Weights and failure counts; the parameters are in `trained` and `fossils`."""


def _arrange(model: SeededModel, moments: Mapping[int, Any]) -> _Arranged:
    plan, seeds = model.plan, model.seeds
    slots = [int(seeds.slot[place]) for place in running_seeds(seeds)]
    active = tuple(s for s, run in zip(slots, plan.runs, strict=True) if not run.frozen)
    frozen = tuple(s for s, run in zip(slots, plan.runs, strict=True) if run.frozen)
    live = gather(seeds, model.kernels, plan)
    return _Arranged(
        plan,
        active,
        tuple(model.kernels[s].params for s in active),
        tuple(moments[s] for s in active),
        tuple(model.kernels[s].params for s in frozen),
        jax.tree.map(jnp.asarray, with_params(live, ())),
    )


class JaxTrainee:
    """See `Trainee`."""

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        seeds_per_layer: int,
        blend: str,
        optimizer: str,
        learning_rate: float,
    ) -> None:
        self._shape = Shape(task.host_sizes, seeds_per_layer, blend, optimizer, learning_rate)
        self._static = build_static(self._shape)
        self._model = self._static.model
        self._host = _unnamed(self._static.functional.params, initial_host(task.host_sizes, seed))
        self._host_moments = self._static.optimizer.init(self._host)
        self._moments: dict[int, Any] = {}
        self._splits = {
            name: (jnp.asarray(split.x), jnp.asarray(split.y))
            for name, split in task.splits.items()
        }
        self._last_indices: np.ndarray | None = None
        self._running: tuple[Plan, int | None, Any] | None = None
        """The program of the last step: its plan, its batch, and itself."""
        self._now = _arrange(self._model, self._moments)
        self.sites: tuple[str, ...] = self._model.sites
        self._first_compilation = PROGRAMS.compilations

    @property
    def seeds(self) -> SeedState:
        return self._model.seeds

    @property
    def compilations(self) -> int:
        return PROGRAMS.compilations - self._first_compilation

    def _key(self, kind: str, plan: Plan) -> ProgramKey:
        return ProgramKey(kind, self._shape, plan)

    def layer_shape(self, row: int) -> tuple[int, int]:
        layer: Any = self._model.kasmina_layers[self.sites[row]]
        out_features, in_features = layer.weight.shape
        return int(in_features), int(out_features)

    def _settle(self) -> None:
        """Put trained kernels back by slot, before a seed changes."""
        kernels = dict(self._model.kernels)
        now = self._now
        for slot, params, moments in zip(now.active, now.trained, now.moments, strict=True):
            kernels[slot] = Kernel(kernels[slot].program, params)
            self._moments[slot] = moments
        self._model = dataclasses.replace(self._model, kernels=kernels)

    def _grafted(self, event: Event, artifact: Artifact) -> tuple[SeededModel, dict[int, Any]]:
        kernel = load_jax_kernel(artifact)
        model = self._model.apply_event(event, kernel)
        slot = int(model.seeds.slot[event.layer, event.seed])
        return model, {**self._moments, slot: self._static.optimizer.init(kernel.params)}

    def prepare(self, event: Event, artifact: Artifact) -> None:
        self._settle()
        model, moments = self._grafted(event, artifact)
        coming = _arrange(model, moments)
        arguments = self._step_arguments(coming, self._last_indices)
        PROGRAMS.prepare(self._key("step", coming.plan), *arguments)
        live = _evaluation_live(coming, model.seeds)
        arguments = (self._host, live, *self._splits["validation"])
        PROGRAMS.prepare(self._key("evaluate", coming.plan), *arguments)

    def apply(self, event: Event, artifact: Artifact | None = None) -> None:
        self._settle()
        if event.kind is EventKind.ACTIVATE:
            if artifact is None:
                raise ValueError("an ACTIVATE event needs the artifact that it grafts")
            self._model, self._moments = self._grafted(event, artifact)
        else:
            slot = int(self.seeds.slot[event.layer, event.seed])
            self._model = self._model.apply_event(event)
            stage = SeedLifecycleState(int(self.seeds.stage[event.layer, event.seed]))
            if stage is not SeedLifecycleState.ACTIVE:
                self._moments.pop(slot, None)
        self._now = _arrange(self._model, self._moments)

    def advance(self, step: int) -> None:
        if not np.asarray(self.seeds.ramp_span).any():
            return
        self._model = dataclasses.replace(self._model, seeds=advance(self.seeds, step))
        self._now = self._now._replace(live=_reweighted(self._now, self.seeds))

    def _step_arguments(self, now: _Arranged, indices: np.ndarray | None) -> tuple[Any, ...]:
        x, y = self._splits["train"]
        return (
            self._host, self._host_moments, now.trained, now.moments, now.fossils, now.live,
            x, y, indices,
        )  # fmt: skip

    def step(self, indices: np.ndarray | None) -> Any:
        self._last_indices = indices
        now = self._now
        arguments = self._step_arguments(now, indices)
        batch = None if indices is None else len(indices)
        if self._running is None or self._running[0] is not now.plan or self._running[1] != batch:
            program = PROGRAMS.get(self._key("step", now.plan), *arguments)
            self._running = (now.plan, batch, program)
        program = self._running[2]
        self._host, self._host_moments, trained, moments, errors, loss = program(*arguments)
        live = None if now.live is None else dataclasses.replace(now.live, errors=errors)
        self._now = now._replace(trained=trained, moments=moments, live=live)
        return loss

    def read_losses(self, losses: Sequence[Any]) -> np.ndarray:
        if not losses:
            return np.zeros(0, np.float32)
        return np.asarray(jnp.stack([jnp.asarray(loss, jnp.float32) for loss in losses]))

    def absorb(self, step: int) -> list[Event]:
        if self._now.live is None:
            return []
        events = fault_events(self.seeds, self._now.live.errors, step=step)
        for event in events:
            self.apply(event)
        return events

    def evaluate(self, split: str, muted: Collection[Place] = ()) -> Evaluation:
        live = _evaluation_live(self._now, muted_state(self.seeds, muted))
        arguments = (self._host, live, *self._splits[split])
        values = PROGRAMS(self._key("evaluate", self._now.plan), *arguments)
        loss, accuracy, *health = (float(v) for v in np.asarray(values))
        return Evaluation(loss, accuracy, dict(zip(running_seeds(self.seeds), health, strict=True)))

    def predict(self, x: np.ndarray) -> np.ndarray:
        arguments = (self._host, _evaluation_live(self._now, self.seeds), jnp.asarray(x))
        return np.asarray(PROGRAMS(self._key("predict", self._now.plan), *arguments))

    def parameter_count(self) -> int:
        return count_params((self._host, self._now.trained, self._now.fossils))

    def snapshot(self) -> ArrayTree:
        self._settle()
        return {
            "host": _named(self._host),
            "host_moments": _named(self._host_moments),
            "kernels": {str(s): _named(k.params) for s, k in self._model.kernels.items()},
            "moments": {str(s): _named(m) for s, m in self._moments.items()},
            "seeds": state_tree(self.seeds),
        }

    def restore(self, tree: ArrayTree, artifacts: Mapping[int, Artifact]) -> None:
        self._host = _unnamed(self._host, tree["host"])
        self._host_moments = _unnamed(self._host_moments, tree.get("host_moments", {}))
        kernels: dict[int, Kernel] = {}
        for name, params in tree.get("kernels", {}).items():
            born = load_jax_kernel(artifacts[int(name)])
            kernels[int(name)] = Kernel(born.program, _unnamed(born.params, params))
        seeds = tree_state(tree["seeds"])
        self._model = dataclasses.replace(self._model, seeds=seeds, kernels=kernels)
        # An optimiser without moments (SGD) leaves nothing in the tree for them.
        saved = tree.get("moments", {})
        stages = np.asarray(seeds.stage).reshape(-1)
        self._moments = {
            slot: _unnamed(self._static.optimizer.init(kernel.params), saved.get(str(slot), {}))
            for slot, kernel in kernels.items()
            if stages[slot] == SeedLifecycleState.ACTIVE
        }
        self._now = _arrange(self._model, self._moments)


def _reweighted(now: _Arranged, seeds: SeedState) -> Live | None:
    """The live part at the alphas of `seeds`."""
    if now.live is None:
        return None
    weights = gather_weights(seeds, now.plan)
    return dataclasses.replace(
        now.live,
        host_weights=jnp.asarray(weights.host_weights),
        weights=jnp.asarray(weights.weights),
    )


def _evaluation_live(now: _Arranged, seeds: SeedState) -> Live | None:
    return with_params(_reweighted(now, seeds), merge_params(now.plan, now.trained, now.fossils))

"""A host on jax: an Equinox MLP wrapped with seeds, trained in its flat form.

Compiled programs are keyed by the plan and shared by all runs of one shape in
the process. A plan that is about to come is compiled in a background thread.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper.artifacts import Artifact
from esper.execution import load_jax_kernel
from esper.tolaria._tasks import Task, initial_host
from esper.tolaria._trainee import (
    ArrayTree,
    Evaluation,
    Place,
    muted_state,
    state_tree,
    tree_state,
)
from esper_adapters.equinox import FunctionalModel, SeededModel, to_functional, wrap
from esper_functional import (
    Event,
    EventKind,
    Kernel,
    Live,
    Observed,
    Plan,
    SeedLifecycleState,
    SeedState,
    advance,
    count_faults,
    count_params,
    fault_events,
    forward_batch,
    gather,
    gather_weights,
    health_score,
    running_seeds,
)


class _Shape(NamedTuple):
    """What programs depend on besides the plan."""

    sizes: tuple[int, ...]
    seeds_per_layer: int
    blend: str
    optimizer: str
    learning_rate: float


class _Static(NamedTuple):
    model: SeededModel
    functional: FunctionalModel
    optimizer: optax.GradientTransformation


@cache
def _static(shape: _Shape) -> _Static:
    """The wrapped host's structure; one object per shape, so that programs are shared."""
    host = eqx.nn.MLP(
        shape.sizes[0], shape.sizes[-1], shape.sizes[1], len(shape.sizes) - 2, key=jax.random.key(0)
    )
    model = wrap(host, seeds_per_layer=shape.seeds_per_layer, blend=shape.blend)
    make = {"adam": optax.adam, "sgd": optax.sgd}[shape.optimizer]
    return _Static(model, to_functional(model), make(shape.learning_rate))


def _merge(plan: Plan, trained: Sequence[Any], fossils: Sequence[Any]) -> tuple[Any, ...]:
    active, frozen = iter(trained), iter(fossils)
    return tuple(next(frozen) if run.frozen else next(active) for run in plan.runs)


def _forward(
    static: _Static, plan: Plan, host: Any, live: Live | None, x: Any, *, capture: bool = False
) -> tuple[Any, Observed]:
    return forward_batch(static.functional.net, plan, host, live, x, capture=capture)


def _with_params(live: Live | None, params: tuple[Any, ...]) -> Live | None:
    return None if live is None else dataclasses.replace(live, params=params)


def _update(static: _Static, gradient: Any, moments: Any, params: Any) -> tuple[Any, Any]:
    # optax raises floats to integer powers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = static.optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments


def _step_program(static: _Static, plan: Plan) -> Any:
    def step(
        host: Any,
        host_moments: Any,
        trained: tuple[Any, ...],
        moments: tuple[Any, ...],
        fossils: tuple[Any, ...],
        live: Live | None,
        x: Any,
        y: Any,
        indices: Any,
    ) -> Any:
        if indices is not None:
            x, y = x[indices], y[indices]

        def loss_of(host: Any, trained: tuple[Any, ...]) -> Any:
            own = _with_params(live, _merge(plan, trained, fossils))
            logits, seen = _forward(static, plan, host, own, x)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, seen.faults

        gradient = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (loss, faults), (d_host, d_trained) = gradient(host, trained)
        host, host_moments = _update(static, d_host, host_moments, host)
        # Each kernel has an optimiser state of its own: what a graft adds or an
        # unload takes away leaves every other moment as it was.
        stepped = [
            _update(static, d, m, p) for d, m, p in zip(d_trained, moments, trained, strict=True)
        ]
        trained = tuple(params for params, _ in stepped)
        after = count_faults(live, faults)
        errors = None if after is None else after.errors
        return host, host_moments, trained, tuple(m for _, m in stepped), errors, loss

    return step


def _evaluation_program(static: _Static, plan: Plan) -> Any:
    def evaluate(host: Any, live: Live | None, x: Any, y: Any) -> Any:
        logits, seen = _forward(static, plan, host, live, x, capture=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == y).astype(jnp.float32))
        scores = [jnp.asarray(health_score(k)) for k in seen.outputs]
        return jnp.stack([loss, accuracy, *scores])

    return evaluate


def _prediction_program(static: _Static, plan: Plan) -> Any:
    def predict(host: Any, live: Live | None, x: Any) -> Any:
        return jax.nn.softmax(_forward(static, plan, host, live, x)[0])

    return predict


_BUILDERS = {
    "step": _step_program,
    "evaluate": _evaluation_program,
    "predict": _prediction_program,
}


class Programs:
    """Compiled programs by shape, plan and argument shapes, for the whole process."""

    def __init__(self) -> None:
        self._programs: dict[Any, Future[Any]] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="esper-compile")
        self.compilations = 0
        """How many programs were compiled."""

    @property
    def known(self) -> list[Any]:
        """The keys of all programs: kind, shape, plan, and the arguments' structure."""
        return list(self._programs)

    def request(self, kind: str, shape: _Shape, plan: Plan, arguments: tuple[Any, ...]) -> Any:
        """A future of the compiled program; compiles in the background what is new."""
        leaves, structure = jax.tree.flatten(arguments)
        avals = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
        key = (kind, shape, plan, structure, avals)
        if key not in self._programs:
            self.compilations += 1
            specs = jax.tree.unflatten(
                structure, [jax.ShapeDtypeStruct(s, np.dtype(d)) for s, d in avals]
            )
            function = _BUILDERS[kind](_static(shape), plan)

            def compile_it() -> Any:
                return jax.jit(function).lower(*specs).compile()

            self._programs[key] = self._compiler.submit(compile_it)
        return self._programs[key]


PROGRAMS = Programs()


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
        jax.tree.map(jnp.asarray, _with_params(live, ())),
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
        self._shape = _Shape(task.host_sizes, seeds_per_layer, blend, optimizer, learning_rate)
        self._static = _static(self._shape)
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
        coming = _arrange(*self._grafted(event, artifact))
        arguments = self._step_arguments(coming, self._last_indices)
        PROGRAMS.request("step", self._shape, coming.plan, arguments)
        live = _evaluation_live(coming, self.seeds)
        arguments = (self._host, live, *self._splits["validation"])
        PROGRAMS.request("evaluate", self._shape, coming.plan, arguments)

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
            program = PROGRAMS.request("step", self._shape, now.plan, arguments).result()
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
        program = PROGRAMS.request("evaluate", self._shape, self._now.plan, arguments).result()
        loss, accuracy, *health = (float(v) for v in np.asarray(program(*arguments)))
        return Evaluation(loss, accuracy, dict(zip(running_seeds(self.seeds), health, strict=True)))

    def predict(self, x: np.ndarray) -> np.ndarray:
        arguments = (self._host, _evaluation_live(self._now, self.seeds), jnp.asarray(x))
        program = PROGRAMS.request("predict", self._shape, self._now.plan, arguments).result()
        return np.asarray(program(*arguments))

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
    return _with_params(_reweighted(now, seeds), _merge(now.plan, now.trained, now.fossils))

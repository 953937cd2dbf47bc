"""A small network of the core in training, whose kernels come when they are told to."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_functional as ef
from esper.contracts import KernelSignature
from esper.tezzeret import kernel_from_blueprint, load_blueprint
from esper.tolaria import Task, initial_host, load_task
from esper_adapters.optax import carry
from esper_functional import Event, EventKind

SITES = ("hidden", "out")
Incubation = Literal["none", "straight_through", "shadow"]


def net(params: Any, site: ef.Site, x: Any) -> Any:
    """A hidden layer, at which kernels are grafted, and an output layer."""
    h = jax.nn.relu(site("hidden", ef.linear, params["hidden"], x))
    return site("out", ef.linear, params["out"], h)


def straight_through(program: ef.Program) -> ef.Program:
    """The program k - stop(k): added to h, it changes nothing but the kernel's gradient.

    Esper leaves this form of incubation out on purpose; here it is what others are held against.
    The gradient that the kernel gets is that of the loss without it, whatever its output has
    become, so nothing tells it to stop.
    """

    def apply(params: Any, x: Any) -> Any:
        k = program.apply(params, x)
        return k - jax.lax.stop_gradient(k)

    return dataclasses.replace(program, key=f"straight-through:{program.key}", apply=apply)


def _loss_of(
    params: Any, planned: ef.Plan, live: ef.Live | None, x: Any, y: Any
) -> tuple[Any, Any]:
    if live is not None:
        own = tuple(kernel.params for _, kernel in sorted(params["kernels"].items()))
        live = dataclasses.replace(live, params=own)
    logits, _ = ef.forward(net, planned, params["host"], live, x)
    shadows, _ = ef.shadow_forward(net, planned, params["host"], live, x)
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(own, y).mean() for own in (logits, *shadows)
    ]
    return sum(losses, start=jnp.zeros(())), losses[0]


@partial(jax.jit, static_argnums=(0, 3))
def _step(
    optimizer: Any, params: Any, opt_state: Any, planned: ef.Plan, live: Any, x: Any, y: Any
) -> tuple[Any, Any, Any]:
    grads, loss = jax.grad(_loss_of, has_aux=True)(params, planned, live, x, y)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


@partial(jax.jit, static_argnums=1)
def _measure(params: Any, planned: ef.Plan, live: Any, x: Any, y: Any) -> tuple[Any, Any]:
    _, loss = _loss_of(params, planned, live, x, y)
    if live is not None:
        own = tuple(kernel.params for _, kernel in sorted(params["kernels"].items()))
        live = dataclasses.replace(live, params=own)
    logits, _ = ef.forward(net, planned, params["host"], live, x)
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == y)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data, and how a network trains on them; one of them serves all seeds."""

    task: Task
    batch_size: int | None
    """Null takes all examples in every step."""
    width: int
    slots: int
    optimizer: optax.GradientTransformation


def make_problem(
    name: str, *, batch_size: int | None, width: int, slots: int, learning_rate: float
) -> Problem:
    """One of Esper's own tasks."""
    return Problem(load_task(name), batch_size, width, slots, optax.adam(learning_rate))


class Growing:
    """A network and its optimiser, one step after another."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem = problem
        self.now = 0
        self._seed = seed
        self._random = np.random.default_rng([seed, 1])
        host = initial_host(problem.task.host_sizes, seed)
        layers = {
            name: {role: jnp.asarray(host[f"layers.{i}.{role}"]) for role in ("weight", "bias")}
            for i, name in enumerate(SITES)
        }
        self._params: dict[str, Any] = {"host": layers, "kernels": {}}
        self._opt_state = problem.optimizer.init(self._params)
        self._programs: dict[int, ef.Program] = {}
        self._seeds = ef.init_seeds(len(SITES), problem.slots)
        self._train = jnp.asarray(problem.task.train.x), jnp.asarray(problem.task.train.y)
        self._test = jnp.asarray(problem.task.test.x), jnp.asarray(problem.task.test.y)
        self._plan()

    def graft(self, slot: int, incubation: Incubation = "none") -> None:
        """Graft a residual MLP, whose output is 0 at first; incubated ones run beside the host."""
        sizes = self.problem.task.host_sizes
        signature = KernelSignature(input_shape=(sizes[0],), output_shape=(sizes[1],))
        kernel = kernel_from_blueprint(
            load_blueprint("residual_mlp"),
            signature,
            sizes={"width": self.problem.width},
            init_seed=1_000 * self._seed + slot,
        )
        self._programs[slot] = kernel.program
        if incubation == "straight_through":
            kernel = dataclasses.replace(kernel, program=straight_through(kernel.program))
        alpha = 0.0 if incubation == "shadow" else 1.0
        events = [
            Event(self.now, 0, slot, EventKind.LOAD, value=slot),
            Event(self.now, 0, slot, EventKind.ACTIVATE, value=alpha),
        ]
        if incubation == "shadow":
            events.append(Event(self.now, 0, slot, EventKind.INCUBATE))
        self._seeds = ef.fold_events(self._seeds, events)
        self._with_kernels({**self._params["kernels"], slot: kernel})

    def blend(self, slot: int) -> None:
        """End an incubation: the kernel's output counts from the next step on."""
        kernel = self._params["kernels"][slot]
        kernel = dataclasses.replace(kernel, program=self._programs[slot])
        events = [Event(self.now, 0, slot, EventKind.ALPHA, value=1.0)]
        self._seeds = ef.fold_events(self._seeds, events)
        self._with_kernels({**self._params["kernels"], slot: kernel})

    def _with_kernels(self, kernels: dict[int, ef.Kernel]) -> None:
        params = {**self._params, "kernels": kernels}
        # A kernel keeps its moments over the change of its program: its leaves are the same.
        before = {**self._params, "kernels": {
            slot: dataclasses.replace(own, program=kernels[slot].program)
            for slot, own in self._params["kernels"].items()
        }}  # fmt: skip
        structure = jax.tree.structure(self.problem.optimizer.init(before))
        state = jax.tree.unflatten(structure, jax.tree.leaves(self._opt_state))
        self._opt_state = carry(self.problem.optimizer, state, before, params)
        self._params = params
        self._plan()

    def _plan(self) -> None:
        kernels = self._params["kernels"]
        self._planned = ef.plan(self._seeds, kernels, SITES, blend="residual")
        self._live = ef.gather(self._seeds, kernels, self._planned)

    def step(self) -> Any:
        """One step of training; the loss before it, on the device."""
        x, y = self._train
        if self.problem.batch_size is not None:
            batch = self._random.integers(0, len(x), self.problem.batch_size)
            x, y = x[batch], y[batch]
        self._params, self._opt_state, loss = _step(
            self.problem.optimizer, self._params, self._opt_state, self._planned, self._live, x, y
        )
        self.now += 1
        return loss

    def test(self) -> tuple[float, float]:
        """Loss and accuracy in [0, 1] on the test data."""
        loss, accuracy = _measure(self._params, self._planned, self._live, *self._test)
        return float(loss), float(accuracy)

    def parameters(self) -> int:
        """Of host and kernels."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._params))

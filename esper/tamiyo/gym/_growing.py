"""One growing network of the gym: its parameters, how they train, and what is measured of it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32
from scipy.stats import t

from esper.tamiyo.graph import MOST_ROWS, follows
from esper.tamiyo.gym._host import OUT, WIDTH, Shape, first_params, network, site_names
from esper.tamiyo.gym._kernels import KernelTable
from esper_functional import (
    NO_PROGRAM,
    Bank,
    Layer,
    SeedLifecycleState,
    SeedState,
    advance,
    forward_dynamic,
    health_score,
    linear,
    make_bank,
    record_faults,
    running,
)

_MOMENTS = optax.scale_by_adam()
PARTS = 8
"""Of the validation data, by which worths have intervals, as in `esper.tolaria.worth`."""
_HALF = float(t.ppf(0.975, PARTS - 1)) / PARTS**0.5
"""Half of a 95 % interval of Student's t, in standard deviations over parts."""
_HEALTHY = 32
"""Examples on which health is measured."""


class Data(NamedTuple):
    """Examples of one task."""

    x: Float[Array, "train inputs"]
    y: Int32[Array, " train"]
    validation_x: Float[Array, "validation inputs"]
    validation_y: Int32[Array, " validation"]


class Trained(NamedTuple):
    """What an optimiser moves, with its moments."""

    host: Any
    kernels: Any
    """For each program its parameters, every leaf `[slots, ...]`."""
    host_moments: Any
    kernel_moments: Any
    """Of each slot by itself, so that a graft begins with none."""


class Growing(NamedTuple):
    """A network with its seeds."""

    trained: Trained
    code: Int32[Array, " slots"]
    """Which program each slot holds."""
    seeds: SeedState


class Measured(NamedTuple):
    """What a network does on the validation data, and how its layers are."""

    loss: Any
    accuracy: Any
    worth: Any
    """f32 `[layers, seeds]`; NaN where no kernel runs. As `esper.tolaria.worth.removal_costs`."""
    worth_half: Any
    all_worth: Any
    """Of all kernels together; 0 where none runs."""
    all_worth_spread: Any
    """Standard deviation of that over parts."""
    novelty: Any
    """See `esper.tolaria.worth.output_distance`."""
    health: Any
    """f32 `[layers, seeds]`; NaN where no kernel runs."""


@dataclasses.dataclass(frozen=True)
class World:
    """What all networks of a gym share; static."""

    table: KernelTable
    depth: int
    """Hidden layers of the deepest host."""
    seeds: int
    """Of each layer."""
    batch: int
    steps: int
    """Of the optimiser, between boundaries."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Layers with seeds, by row."""
        return site_names(self.depth)

    def bank(self, kernels: Any, code: Any) -> Bank:
        """The kernels as the core takes them."""
        return Bank(code, kernels, tuple(own.program for own in self.table.patterns))

    def born(self, key: jax.Array, shape: Shape, seeds: SeedState) -> Growing:
        """A dormant network."""
        slots = self.depth * self.seeds
        empty = make_bank({}, slots=slots, also=self.table.patterns)
        host = first_params(key, shape, self.depth)
        moments = jax.vmap(_MOMENTS.init)(empty.params)
        trained = Trained(host, empty.params, _MOMENTS.init(host), moments)
        return Growing(trained, jnp.full(slots, NO_PROGRAM, jnp.int32), seeds)

    def forward(
        self, host: Any, kernels: Any, code: Any, seeds: SeedState, x: Any, depth: Any,
        layer: Layer = linear,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Logits `[batch, classes]`, and which kernels failed, bool `[layers, seeds]`."""

        def net(params: Any, site: Any, x: Any) -> Any:
            return network(params, site, x, depth, self.depth, layer)

        bank = self.bank(kernels, code)
        return forward_dynamic(net, host, seeds, bank, x, sites=self.sites, blend="residual")

    def train(
        self, growing: Growing, data: Data, shape: Shape, rate: Any, key: jax.Array, first: Any
    ) -> tuple[Growing, Float[Array, " steps"], Any]:
        """`steps` steps; returns their losses, and the gradient by the host of the last one."""

        def loss_of(trained: Any, seeds: SeedState, x: Any, y: Any) -> tuple[Any, Any]:
            host, kernels = trained
            logits, faults = self.forward(host, kernels, growing.code, seeds, x, shape.depth)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.mean(losses), faults

        def one(carried: tuple[Trained, SeedState], now: Any) -> Any:
            trained, seeds = carried
            seeds = advance(seeds, now)
            x, y = _batch(key, now, data, self.batch)
            (loss, faults), (host, kernels) = jax.value_and_grad(loss_of, has_aux=True)(
                (trained.host, trained.kernels), seeds, x, y
            )
            moving = (running(seeds) & (seeds.stage == int(SeedLifecycleState.ACTIVE))).reshape(-1)
            trained = _stepped(trained, host, kernels, rate, moving)
            return (trained, record_faults(seeds, faults, step=now)), (loss, host)

        steps = first + jnp.arange(self.steps, dtype=jnp.int32)
        carried = (growing.trained, growing.seeds)
        (trained, seeds), (losses, gradients) = jax.lax.scan(one, carried, steps)
        seeds = advance(seeds, first + self.steps)
        last = jax.tree.map(lambda leaf: leaf[-1], gradients)
        return Growing(trained, growing.code, seeds), losses, last

    def train_host(
        self, host: Any, moments: Any, data: Data, shape: Shape, rate: Any, key: jax.Array,
        first: Any,
    ) -> tuple[Any, Any, Float[Array, " steps"]]:  # fmt: skip
        """The same steps of a host that never grows: the twin."""

        def loss_of(host: Any, x: Any, y: Any) -> Any:
            logits = network(host, _bare, x, shape.depth, self.depth)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        def one(carried: Any, now: Any) -> Any:
            host, moments = carried
            x, y = _batch(key, now, data, self.batch)
            loss, gradient = jax.value_and_grad(loss_of)(host, x, y)
            updates, moments = _updates(gradient, moments)
            return (jax.tree.map(lambda p, u: p - rate * u, host, updates), moments), loss

        steps = first + jnp.arange(self.steps, dtype=jnp.int32)
        (host, moments), losses = jax.lax.scan(one, (host, moments), steps)
        return host, moments, losses

    def host_loss(self, host: Any, data: Data, shape: Shape) -> Any:
        """On the validation data."""
        logits = network(host, _bare, data.validation_x, shape.depth, self.depth)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.validation_y)
        return jnp.mean(losses)

    def measure(self, growing: Growing, data: Data, shape: Shape) -> Measured:
        """See `Measured`: all variants in one batched pass."""
        seeds, trained = growing.seeds, growing.trained
        runs = running(seeds)
        count = self.depth * self.seeds
        each = jnp.eye(count, dtype=jnp.bool_).reshape(count, self.depth, self.seeds)
        none = jnp.zeros((1, self.depth, self.seeds), jnp.bool_)
        muted = jnp.concatenate([none, each, ~none])

        def logits_without(muted: Any) -> Any:
            alpha = jnp.where(muted, 0.0, seeds.alpha)
            own = seeds.replace(alpha=alpha)
            return self.forward(
                trained.host, trained.kernels, growing.code, own, data.validation_x, shape.depth
            )[0]

        logits = jax.vmap(logits_without)(muted)
        labels = jnp.broadcast_to(data.validation_y, logits.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        parts = jnp.mean(losses.reshape(len(losses), -1, PARTS), axis=1)
        gaps = parts[1:] - parts[0]
        worth = jnp.mean(gaps, axis=1)
        spread = jnp.std(gaps, axis=1, ddof=1)
        half = _HALF * spread

        def of_running(values: Any) -> Any:
            return jnp.where(runs, values.reshape(runs.shape), jnp.nan)

        some = jnp.any(runs)
        apart = jnp.linalg.norm(logits[0] - logits[-1])
        size = jnp.linalg.norm(logits[0]) + jnp.linalg.norm(logits[-1])
        right = jnp.argmax(logits[0], axis=-1) == data.validation_y
        return Measured(
            jnp.mean(losses[0]),
            jnp.mean(right.astype(jnp.float32)),
            of_running(worth[:-1]),
            of_running(half[:-1]),
            jnp.where(some, worth[-1], 0.0),
            jnp.where(some, spread[-1], 0.0),
            jnp.where(some & (size > 0.0), apart / jnp.where(size > 0.0, size, 1.0), 0.0),
            jnp.where(runs, self._health(growing, data, shape), jnp.nan),
        )

    def follows(self, growing: Growing, data: Data, shape: Shape) -> Float[Array, "layers 2"]:
        """What a kernel in each hidden layer could bring; see `esper.tamiyo.graph.follows`."""
        x, y = data.x[:MOST_ROWS], data.y[:MOST_ROWS]
        trained = growing.trained

        def loss_of(nudges: Any) -> tuple[Any, Any]:
            seen: list[Any] = []

            def layer(params: Any, x: Any) -> Any:
                seen.append(x)
                return linear(params, x) + nudges[len(seen) - 1]

            logits, _ = self.forward(
                trained.host, trained.kernels, growing.code, growing.seeds, x, shape.depth, layer
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.sum(losses), seen

        nudges = [jnp.zeros((len(x), WIDTH))] * self.depth
        gradients, seen = jax.grad(loss_of, has_aux=True)(nudges)
        each = [follows(own, g, jnp) for own, g in zip(seen, gradients, strict=True)]
        return jnp.stack(each)

    def _health(self, growing: Growing, data: Data, shape: Shape) -> Float[Array, "layers seeds"]:
        seen: list[Any] = []

        def layer(params: Any, x: Any) -> Any:
            seen.append(x)
            return linear(params, x)

        trained = growing.trained
        self.forward(
            trained.host, trained.kernels, growing.code, growing.seeds,
            data.validation_x[:_HEALTHY], shape.depth, layer,
        )  # fmt: skip
        rows = [
            _health_of(self._outputs(growing, slot, seen[slot // self.seeds]), shape.width)
            for slot in range(self.depth * self.seeds)
        ]
        return jnp.stack(rows).reshape(self.depth, self.seeds)

    def _outputs(self, growing: Growing, slot: int, x: Any) -> Any:
        """What the program that a slot holds gives."""
        outputs = [
            own.program.apply(jax.tree.map(lambda leaf: leaf[slot], params), x)
            for own, params in zip(self.table.patterns, growing.trained.kernels, strict=True)
        ]
        return jnp.stack(outputs)[jnp.maximum(growing.code[slot], 0)]


def _health_of(y: Any, width: Any) -> Any:
    """`health_score` over the units that are there: the others are still, and not alive."""
    alive = WIDTH * jnp.asarray(health_score(y))
    return jnp.minimum(alive / jnp.asarray(width).astype(jnp.float32), 1.0)


def _bare(name: str, layer: Any, params: Any, x: Any) -> Any:
    return layer(params, x)


def _batch(key: jax.Array, now: Any, data: Data, size: int) -> tuple[Any, Any]:
    chosen = jax.random.randint(jax.random.fold_in(key, now), (size,), 0, len(data.x))
    return data.x[chosen], data.y[chosen]


def _updates(gradient: Any, moments: Any) -> Any:
    # optax takes integers for numbers.
    with jax.numpy_dtype_promotion("standard"):
        return _MOMENTS.update(gradient, moments)


def _stepped(trained: Trained, host: Any, kernels: Any, rate: Any, moving: Any) -> Trained:
    """One step of Adam (Kingma and Ba, 2015), of host and of kernels that are not frozen."""
    updates, host_moments = _updates(host, trained.host_moments)
    more, kernel_moments = jax.vmap(_updates)(kernels, trained.kernel_moments)

    def where_moving(new: Any, old: Any) -> Any:
        return jnp.where(moving.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return Trained(
        jax.tree.map(lambda p, u: p - rate * u, trained.host, updates),
        jax.tree.map(lambda p, u: where_moving(p - rate * u, p), trained.kernels, more),
        host_moments,
        jax.tree.map(where_moving, kernel_moments, trained.kernel_moments),
    )


def norms(params: Any, sites: tuple[str, ...], nodes: int) -> Float[Array, " nodes"]:
    """The norm of each layer's own, `OUT` last; 0 for rows beyond."""
    own = [optax.tree.norm(params[name]) for name in (*sites, OUT)]
    return jnp.zeros(nodes, jnp.float32).at[: len(own)].set(jnp.stack(own))

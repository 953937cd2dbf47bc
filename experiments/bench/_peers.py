"""Peers: two other ways to do what one grafted low-rank kernel does.

- LoRA (E. J. Hu et al., 2021) as Equinox users put it in: `eqx.tree_at` replaces a
  linear layer by a module of the user's own.
- Slots allocated beforehand: kernels for every slot are computed in every step, and
  those that are not in use are masked.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esper_adapters.equinox import to_functional, trainable, wrap
from esper_functional import gather, linear, plan
from experiments.bench._networks import grafted, low_rank, make_kernels, make_stack
from experiments.bench._paired import Call, Sampling, contest
from experiments.bench._results import Results
from experiments.bench._steps import (
    fresh,
    on_device,
    planned,
    planned_batch,
    sgd,
    sgd_with,
    with_nothing,
)

LORA_SCALE = 0.5


@dataclasses.dataclass(frozen=True)
class Peering:
    """A width and a batch at which peers are compared."""

    name: str
    width: int
    rank: int
    slots: int
    """Seeds that a layer has, and kernels that are allocated beforehand."""
    x: jax.Array
    target: jax.Array
    sampling: Sampling
    learning_rate: float
    seed: int


class LoraLinear(eqx.Module):
    """A linear layer and a low-rank update of it."""

    host: eqx.nn.Linear
    a: jax.Array
    """`[in, rank]`."""
    b: jax.Array
    """`[rank, out]`."""
    scale: float = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """For one example, like every layer of Equinox."""
        return self.host(x) + self.scale * (x @ self.a @ self.b)


def measure_lora(results: Results, peering: Peering) -> None:
    """A LoRA layer in an MLP with one hidden layer, and a low-rank kernel in the same place.

    All parameters train, the host's too, in all variants. *module* is the Equinox face
    under `jax.vmap`, *functional* the flat form of the same model in `forward_batch`.
    """
    x, target, width, rank = peering.x, peering.target, peering.width, peering.rank
    mlp = eqx.nn.MLP(width, width, width, 1, key=jax.random.key(peering.seed))
    kernel = make_kernels("low rank", 1, width, rank, peering.seed)[0]
    lora = eqx.tree_at(
        lambda m: m.layers[0],
        mlp,
        LoraLinear(mlp.layers[0], kernel.params["a"], kernel.params["b"], LORA_SCALE),
    )
    model = wrap(mlp, target_layers=("layers.0",), blend="residual")
    model = model.load_kernel("layers.0", 0, kernel, alpha=LORA_SCALE)
    flat, live = to_functional(model), model.live
    assert live is not None

    def as_module(module: Any, chosen: Any) -> tuple[Any, Any]:
        params, static = eqx.partition(module, chosen)
        return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)

    lora_params, lora_apply = as_module(lora, eqx.is_inexact_array)
    own_params, own_apply = as_module(model.module, trainable(model.module))
    flat_args = ((flat.params, live.params), on_device(live))
    flat_apply = planned_batch(flat.net, model.plan)
    rate = peering.learning_rate

    def build_forward() -> Mapping[str, Call]:
        return {
            "LoRA": partial(fresh(lora_apply), lora_params, x),
            "again": partial(fresh(lora_apply), lora_params, x),
            "module": partial(fresh(own_apply), own_params, x),
            "functional": partial(fresh(flat_apply), *flat_args, x),
        }

    def build_step() -> Mapping[str, Call]:
        return {
            "LoRA": partial(fresh(sgd(lora_apply, rate)), lora_params, x, target),
            "again": partial(fresh(sgd(lora_apply, rate)), lora_params, x, target),
            "module": partial(fresh(sgd(own_apply, rate)), own_params, x, target),
            "functional": partial(fresh(sgd_with(flat_apply, rate)), *flat_args, x, target),
        }

    targets = {"module": None, "functional": None}
    for work, build in {"forward": build_forward, "training step": build_step}.items():
        title = f"{peering.name}, against LoRA, {work}"
        if results.wants(title):
            results.rows += contest(title, targets, build, peering.sampling, jax.block_until_ready)


def measure_slots(results: Results, peering: Peering) -> None:
    """All slots computed and all but one masked, and a plan in which one of as many runs."""
    x, target, width, rank = peering.x, peering.target, peering.width, peering.rank
    count = peering.slots
    host = make_stack(1, width, peering.seed)
    kernels = make_kernels("low rank", count, width, rank, peering.seed)
    stacked = jax.tree.map(lambda *own: jnp.stack(own), *(k.params for k in kernels.values()))
    mask = jnp.asarray([1.0] + [0.0] * (count - 1))
    alpha = jnp.full(count, 0.6)

    def masked(params: Any, control: Any, x: Any) -> Any:
        own, slots = params
        mask, alpha = control
        weights = mask * alpha
        y = linear(own[0], x) * (1.0 - jnp.sum(weights))
        for i in range(count):
            y = y + low_rank({"a": slots["a"][i], "b": slots["b"][i]}, x) * weights[i]
        return y

    state = grafted(1, count, [(0, 0)], 0.6)
    chosen = plan(state, kernels, host.sites)
    live = gather(state, kernels, chosen)
    assert live is not None
    own_args = ((host.params, live.params), on_device(live), x)
    own_apply = planned(host.net, chosen)
    args = ((host.params, stacked), (mask, alpha), x)
    rate = peering.learning_rate

    def build_forward() -> Mapping[str, Call]:
        twins = {twin: partial(fresh(masked), *args) for twin in ("slots", "again")}
        return {**twins, "planned": partial(fresh(own_apply), *own_args)}

    def build_step() -> Mapping[str, Call]:
        step = sgd_with(with_nothing(masked), rate)
        twins = {twin: partial(fresh(step), *args, target) for twin in ("slots", "again")}
        return {**twins, "planned": partial(fresh(sgd_with(own_apply, rate)), *own_args, target)}

    for work, build in {"forward": build_forward, "training step": build_step}.items():
        title = f"{peering.name}, 1 of {count} against {count} masked slots, {work}"
        if results.wants(title):
            results.rows += contest(
                title, {"planned": 1.0}, build, peering.sampling, jax.block_until_ready
            )

"""The compiled programs of a host on jax.

Keyed by kind, design and plan, and shared by all runs in the process: a second run
of one design compiles nothing.
"""

import dataclasses
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from esper.errors import InputError
from esper.execution import PlannedPrograms
from esper.tolaria._jax_network import Network, narrow, network_of
from esper.tolaria._trainee import Optimisation
from esper.tolaria.tasks import Host, Loss
from esper_functional import (
    Live,
    Plan,
    count_faults,
    health_score,
)


class Design(NamedTuple):
    """What programs depend on besides the plan; hashable."""

    host: Host
    loss: Loss
    seeds_per_layer: int
    blend: str
    isolate: bool
    grow_at: tuple[str, ...]
    example_shape: tuple[int, ...]
    example_dtype: str
    optimisation: Optimisation


class Static(NamedTuple):
    """The structure that programs close over."""

    network: Network
    optimizer: optax.GradientTransformation


def _check_options(how: Optimisation) -> None:
    if how.optimizer == "adam" and how.weight_decay:
        raise InputError(
            f"weight_decay is {how.weight_decay}, and adam has none that is decoupled from the"
            " gradient: choose the optimizer adamw"
        )
    if how.optimizer != "sgd" and how.momentum:
        raise InputError(
            f"momentum is {how.momentum}, and is of sgd alone: {how.optimizer} has moments of its"
            " own; leave it out, or choose the optimizer sgd"
        )


@cache
def build_static(design: Design) -> Static:
    """The wrapped host's structure; one object per design, so that programs are shared.

    Raises:
        InputError: for options that the chosen optimiser does not have, and hosts that
            `network_of` refuses.
        SeedIndexError: where `grow_at` names a layer that is not there.
    """
    how = design.optimisation
    _check_options(how)
    direction = {
        "adam": optax.scale_by_adam,
        "adamw": optax.scale_by_adam,
        "sgd": lambda: optax.trace(how.momentum) if how.momentum else optax.identity(),
    }[how.optimizer]()
    parts = [direction]
    if how.weight_decay:
        parts.append(optax.add_decayed_weights(how.weight_decay))
    network = network_of(
        design.host,
        seeds_per_layer=design.seeds_per_layer,
        blend=design.blend,
        isolate=design.isolate,
        grow_at=design.grow_at,
        example=jax.ShapeDtypeStruct(design.example_shape, design.example_dtype),
        precision=how.precision,
    )
    return Static(network, optax.chain(*parts) if len(parts) > 1 else direction)


@lru_cache(maxsize=64)
def host_flops(design: Design) -> int:
    """Of a forward pass of one example of the bare host, by XLA's count of its program."""
    network = build_static(design).network
    x = jax.ShapeDtypeStruct((1, *design.example_shape), design.example_dtype)

    def run(params: Any, rest: Any, x: Any) -> Any:
        return network.judge(network.model.plan, params, None, rest, x)[0]

    lowered = jax.jit(run).lower(network.training.params, network.training.rest, x)
    counted = lowered.cost_analysis() or {}
    return max(0, round(float(counted.get("flops", 0.0))))


class Group(NamedTuple):
    """Parameters that train together: the host's, or those of one kernel."""

    params: Any
    moments: Any
    average: Any
    """Exponential moving average of the parameters; None where none is kept."""


def new_group(static: Static, how: Optimisation, params: Any) -> Group:
    """Parameters with new moments."""
    params = jax.tree.map(as_jax, params)
    return _group(how, params, static.optimizer.init(params))


def kernel_group(static: Static, how: Optimisation, params: Any) -> Group:
    """The same for a kernel, whose like often came before: moments of equal types are shared."""
    params = jax.tree.map(as_jax, params)
    leaves, tree = jax.tree.flatten(params)
    types = tuple(jax.typeof(leaf) for leaf in leaves)
    return _group(how, params, _first_moments(static.optimizer, tree, types))


def _group(how: Optimisation, params: Any, moments: Any) -> Group:
    return Group(params, moments, None if how.ema_decay is None else params)


def as_jax(leaf: Any) -> jax.Array:
    """A leaf as jax's array; converting what needs none takes longer than looking."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


@lru_cache(maxsize=32)
def _first_moments(
    optimizer: optax.GradientTransformation, tree: Any, types: tuple[Any, ...]
) -> Any:
    return optimizer.init(jax.tree.unflatten(tree, [jnp.zeros(t.shape, t.dtype) for t in types]))


def merge_params(plan: Plan, trained: Sequence[Any], fossils: Sequence[Any]) -> tuple[Any, ...]:
    """Parameters of all running kernels, in plan order."""
    active, frozen = iter(trained), iter(fossils)
    return tuple(next(frozen) if run.frozen else next(active) for run in plan.runs)


def with_params(live: Live | None, params: tuple[Any, ...]) -> Live | None:
    """The live part with other parameters."""
    return None if live is None else dataclasses.replace(live, params=params)


def _label_losses(loss: Loss, outputs: Any, y: Any) -> Any:
    """The loss of each label, in float32."""
    outputs = outputs.astype(jnp.float32)
    if loss == "mean_squared_error":
        # Outputs of one value an example may have an axis for it that labels lack.
        return jnp.square(outputs.reshape(y.shape) - y)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def _example_losses(loss: Loss, outputs: Any, y: Any) -> Any:
    """The loss of each example `[n]`, a mean over its own labels."""
    return _label_losses(loss, outputs, y).reshape(len(y), -1).mean(axis=1)


def _mean_loss(loss: Loss, outputs: Any, y: Any) -> Any:
    return _label_losses(loss, outputs, y).mean()


def _norm(tree: Any) -> Any:
    squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def _updated(static: Static, how: Optimisation, group: Group, gradient: Any, rate: Any) -> Group:
    # optax raises floats to integer powers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        if how.clip_norm is not None:
            norm = _norm(gradient)
            # A norm that is not finite scales nothing: what is not finite is to be seen.
            scale = jnp.where(norm > how.clip_norm, how.clip_norm / norm, 1.0)
            gradient = jax.tree.map(lambda g: g * scale, gradient)
        directions, moments = static.optimizer.update(gradient, group.moments, group.params)
        params = jax.tree.map(lambda p, d: p + -rate * d, group.params, directions)
        average = group.average
        if how.ema_decay is not None:
            keep = how.ema_decay
            average = jax.tree.map(lambda a, p: keep * a + (1.0 - keep) * p, average, params)
    return Group(params, moments, average)


def _step_program(static: Static, design: Design, plan: Plan) -> Any:
    network, how = static.network, design.optimisation

    def loss_of(
        host: Any, trained: Any, fossils: Any, live: Any, rest: Any, x: Any, y: Any, key: Any
    ) -> Any:
        own = with_params(live, narrow(merge_params(plan, trained, fossils), how.precision))
        host, x = narrow(host, how.precision), narrow(x, how.precision)
        outputs, seen, after = network.train(plan, host, own, rest, x, key)
        loss = _mean_loss(design.loss, outputs, y)
        total, faults = loss, [seen.faults]
        if plan.incubating:
            # From the state that the step began with: what the host draws is the same.
            shadows, hidden = network.shadows(plan, host, own, rest, x, key)
            total = loss + sum(_mean_loss(design.loss, shadow, y) for shadow in shadows)
            faults.append(hidden.faults)
        return total, (loss, _joined(faults), after)

    gradient = jax.grad(loss_of, argnums=(0, 1), has_aux=True)

    def step(
        host: Group,
        trained: tuple[Group, ...],
        fossils: tuple[Any, ...],
        live: Live | None,
        rest: Any,
        x: Any,
        y: Any,
        indices: Any,
        rates: Any,
        key: Any,
    ) -> Any:
        if indices is not None:
            x, y = x[indices], y[indices]
        params = tuple(group.params for group in trained)
        if key is not None:
            key = jax.random.fold_in(jax.random.key(key[0]), key[1])

        def part(rest: Any, batch: Any) -> Any:
            x, y, key = batch
            return gradient(host.params, params, fossils, live, rest, x, y, key)

        if how.accumulate == 1:
            grads, (loss, faults, rest) = part(rest, (x, y, key))
        else:
            grads, loss, faults, rest = _accumulated(part, how.accumulate, rest, x, y, key)
        d_host, d_trained = grads
        # Each kernel has an optimiser state of its own: what a graft adds or an unload takes away
        # leaves every other moment as it was.
        host = _updated(static, how, host, d_host, rates[0])
        after = tuple(
            _updated(static, how, group, d, rate)
            for group, d, rate in zip(trained, d_trained, rates[1:], strict=True)
        )
        counted = count_faults(live, faults)
        return host, after, None if counted is None else counted.errors, rest, loss

    return step


def _steps_program(static: Static, design: Design, plan: Plan) -> Any:
    step = _step_program(static, design, plan)

    def steps(
        host: Group,
        trained: tuple[Group, ...],
        fossils: tuple[Any, ...],
        live: Live | None,
        rest: Any,
        x: Any,
        y: Any,
        indices: Any,
        rates: Any,
        keys: Any,
    ) -> Any:
        def one(carry: Any, each: Any) -> Any:
            host, trained, live, rest = carry
            index, rate, key = each
            host, trained, errors, rest, loss = step(
                host, trained, fossils, live, rest, x, y, index, rate, key
            )
            live = None if live is None else dataclasses.replace(live, errors=errors)
            return (host, trained, live, rest), loss

        first = (host, trained, live, rest)
        last, losses = jax.lax.scan(one, first, (indices, rates, keys))
        host, trained, live, rest = last
        return host, trained, None if live is None else live.errors, rest, losses

    return steps


def _joined(faults: Sequence[Any]) -> tuple[Any, ...]:
    """Of each kernel what was seen of it: in the forward pass, or in its shadow."""
    return tuple(
        next((fault for fault in own if fault is not None), None)
        for own in zip(*faults, strict=True)
    )


def _accumulated(part: Any, parts: int, rest: Any, x: Any, y: Any, key: Any) -> Any:
    """Means over equal parts of a batch, one after the other."""
    shaped = jax.tree.map(lambda a: a.reshape(parts, len(a) // parts, *a.shape[1:]), (x, y))
    keys = None if key is None else jax.random.split(key, parts)

    def scanned(rest: Any, batch: Any) -> Any:
        grads, (loss, faults, rest) = part(rest, batch)
        return rest, (grads, loss, faults)

    rest, (grads, losses, faults) = jax.lax.scan(scanned, rest, (*shaped, keys))
    grads = jax.tree.map(lambda g: g.mean(axis=0), grads)
    return grads, losses.mean(), jax.tree.map(jnp.any, faults), rest


def _judged(static: Static, design: Design, plan: Plan, host: Any, live: Any, rest: Any, x: Any):
    """A forward pass as it is judged, in the precision that is trained in."""
    how = design.optimisation
    own = with_params(live, narrow(() if live is None else live.params, how.precision))
    host, x = narrow(host, how.precision), narrow(x, how.precision)
    return static.network.judge(plan, host, own, rest, x)


def _evaluation_program(static: Static, design: Design, plan: Plan) -> Any:
    def evaluate(host: Any, live: Live | None, rest: Any, x: Any, y: Any) -> Any:
        outputs, seen = _judged(static, design, plan, host, live, rest, x)
        loss = _mean_loss(design.loss, outputs, y)
        accuracy = jnp.asarray(jnp.nan, jnp.float32)
        if design.loss == "cross_entropy":
            accuracy = jnp.mean((jnp.argmax(outputs, axis=-1) == y).astype(jnp.float32))
        scores = [
            jnp.asarray(health_score(k.astype(jnp.float32))) for k in seen.outputs if k is not None
        ]
        return jnp.stack([loss, accuracy, *scores])

    return evaluate


def _variants_program(static: Static, design: Design, plan: Plan) -> Any:
    def variants(host: Any, live: Live | None, rest: Any, weights: Any, x: Any, y: Any) -> Any:
        def one(weights: Any) -> Any:
            shown = live and dataclasses.replace(
                live, host_weights=weights.host_weights, weights=weights.weights
            )
            outputs, _ = _judged(static, design, plan, host, shown, rest, x)
            return _example_losses(design.loss, outputs, y)

        return jax.vmap(one)(weights)

    return variants


def _probe_program(static: Static, design: Design, plan: Plan, sites: tuple[str, ...]) -> Any:
    def probe(host: Any, live: Live | None, rest: Any, x: Any, y: Any) -> Any:
        # Kernels run in the precision that they were compiled for, and all else with them.
        short = design.optimisation.precision
        own = with_params(live, narrow(() if live is None else live.params, short))
        host, x = narrow(host, short), narrow(x, short)

        def loss_of(nudges: Any) -> Any:
            outputs, seen = static.network.probe(plan, host, own, rest, x, nudges)
            return _mean_loss(design.loss, outputs, y), seen

        known = {site: static.network.probed(site) for site in sites}
        nudges: dict[str, jax.Array] = {}
        for site, own_shape in known.items():
            shape = list(own_shape.whole_outputs)
            shape.insert(own_shape.batch_axis, len(x))
            nudges[site] = jnp.zeros(shape, jnp.float32)
        (loss, seen), gradients = jax.value_and_grad(loss_of, has_aux=True)(nudges)
        return loss, [
            tuple(
                jnp.moveaxis(array, known[site].batch_axis, 0)
                for array in (*seen[site], gradients[site])
            )
            for site in sites
        ]

    return probe


def _norms_program(static: Static, design: Design, plan: Plan) -> Any:
    def norms(host: Any, live: Live | None, rest: Any, x: Any, y: Any) -> Any:
        def loss_of(host: Any) -> Any:
            outputs, _ = _judged(static, design, plan, host, live, rest, x)
            return _mean_loss(design.loss, outputs, y)

        trees = (jax.grad(loss_of)(host), host)
        return jnp.stack(
            [jnp.stack([_norm(own) for own in static.network.by_site(t, rest)]) for t in trees]
        )

    return norms


def _prediction_program(static: Static, design: Design, plan: Plan) -> Any:
    def predict(host: Any, live: Live | None, rest: Any, x: Any) -> Any:
        outputs = _judged(static, design, plan, host, live, rest, x)[0].astype(jnp.float32)
        return jax.nn.softmax(outputs) if design.loss == "cross_entropy" else outputs

    return predict


_BUILDERS = {
    "step": _step_program,
    "steps": _steps_program,
    "evaluate": _evaluation_program,
    "variants": _variants_program,
    "norms": _norms_program,
    "predict": _prediction_program,
}


class ProgramKey(NamedTuple):
    """What programs are kept by, besides the types of their arguments."""

    kind: str
    """A key of the builders above, or "probe" with sites."""
    design: Design
    plan: Plan
    sites: tuple[str, ...] = ()


def build_program(key: ProgramKey) -> Any:
    """The function that a program is compiled from."""
    static = build_static(key.design)
    if key.kind == "probe":
        return _probe_program(static, key.design, key.plan, key.sites)
    return _BUILDERS[key.kind](static, key.design, key.plan)


PROGRAMS: PlannedPrograms[ProgramKey] = PlannedPrograms(build_program, warm_up=True)
"""Shared by all runs in the process."""

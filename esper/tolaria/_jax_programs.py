"""The compiled programs of a host on jax.

Keyed by kind, host shape and plan, and shared by all runs in the process.
"""

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from esper.execution import PlannedPrograms
from esper_adapters.equinox import FunctionalModel, SeededModel, to_functional, wrap
from esper_functional import (
    Live,
    Observed,
    Plan,
    count_faults,
    forward_batch,
    health_score,
)


class Shape(NamedTuple):
    """What programs depend on besides the plan."""

    sizes: tuple[int, ...]
    seeds_per_layer: int
    blend: str
    optimizer: str
    learning_rate: float


class Static(NamedTuple):
    """The structure that programs close over."""

    model: SeededModel
    functional: FunctionalModel
    optimizer: optax.GradientTransformation


@cache
def build_static(shape: Shape) -> Static:
    """The wrapped host's structure; one object per shape, so that programs are shared."""
    host = eqx.nn.MLP(
        shape.sizes[0], shape.sizes[-1], shape.sizes[1], len(shape.sizes) - 2, key=jax.random.key(0)
    )
    model = wrap(host, seeds_per_layer=shape.seeds_per_layer, blend=shape.blend)
    make = {"adam": optax.adam, "sgd": optax.sgd}[shape.optimizer]
    return Static(model, to_functional(model), make(shape.learning_rate))


def merge_params(plan: Plan, trained: Sequence[Any], fossils: Sequence[Any]) -> tuple[Any, ...]:
    """Parameters of all running kernels, in plan order."""
    active, frozen = iter(trained), iter(fossils)
    return tuple(next(frozen) if run.frozen else next(active) for run in plan.runs)


def _forward(
    static: Static, plan: Plan, host: Any, live: Live | None, x: Any, *, capture: bool = False
) -> tuple[Any, Observed]:
    return forward_batch(static.functional.net, plan, host, live, x, capture=capture)


def with_params(live: Live | None, params: tuple[Any, ...]) -> Live | None:
    """The live part with other parameters."""
    return None if live is None else dataclasses.replace(live, params=params)


def _update(static: Static, gradient: Any, moments: Any, params: Any) -> tuple[Any, Any]:
    # optax raises floats to integer powers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = static.optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments


def _step_program(static: Static, plan: Plan) -> Any:
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
            own = with_params(live, merge_params(plan, trained, fossils))
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


def _evaluation_program(static: Static, plan: Plan) -> Any:
    def evaluate(host: Any, live: Live | None, x: Any, y: Any) -> Any:
        logits, seen = _forward(static, plan, host, live, x, capture=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == y).astype(jnp.float32))
        scores = [jnp.asarray(health_score(k)) for k in seen.outputs if k is not None]
        return jnp.stack([loss, accuracy, *scores])

    return evaluate


def _prediction_program(static: Static, plan: Plan) -> Any:
    def predict(host: Any, live: Live | None, x: Any) -> Any:
        return jax.nn.softmax(_forward(static, plan, host, live, x)[0])

    return predict


_BUILDERS = {
    "step": _step_program,
    "evaluate": _evaluation_program,
    "predict": _prediction_program,
}


class ProgramKey(NamedTuple):
    """What programs are kept by, besides the types of their arguments."""

    kind: str
    """A key of the builders above."""
    shape: Shape
    plan: Plan


def _build(key: ProgramKey) -> Any:
    return _BUILDERS[key.kind](build_static(key.shape), key.plan)


PROGRAMS: PlannedPrograms[ProgramKey] = PlannedPrograms(_build, warm_up=True)
"""Shared by all runs in the process; a second run of one shape compiles nothing."""

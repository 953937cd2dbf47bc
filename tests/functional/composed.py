"""One grafted layer with kernels of each kind of program, in both modes and by hand."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from esper_functional import (
    Event,
    EventKind,
    Kernel,
    Program,
    fold_events,
    forward,
    forward_dynamic,
    gather,
    init_linear,
    init_seeds,
    linear,
    make_bank,
    plan,
)
from tests.adapters.kernels import jax_kernel

BATCH, IN, OUT = 3, 3, 5
ALPHA = 0.25
KINDS = ("native", "deserialised", "artifact")
"""A jax function; a deserialised program, which has no batching rules; an artifact's, which
comes with a twin that has."""
SITES = ("layer",)
PARAMS = init_linear(jax.random.key(0), IN, OUT)
STATE = fold_events(
    init_seeds(1, 1),
    [Event(0, 0, 0, EventKind.LOAD, value=0.0), Event(0, 0, 0, EventKind.ACTIVATE, value=ALPHA)],
)


def apply(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["a"]) @ params["b"]


def own_params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(3))
    return {"a": jax.random.normal(keys[0], (IN, 4)), "b": jax.random.normal(keys[1], (4, OUT))}


@cache
def kernel(kind: str) -> Kernel:
    if kind == "native":
        return Kernel(Program("native", apply), own_params())
    if kind == "artifact":
        return jax_kernel()
    (b,) = export.symbolic_shape("b")
    avals = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), own_params())
    exported = export.export(jax.jit(apply))(avals, jax.ShapeDtypeStruct((b, IN), jnp.float32))
    again = export.deserialize(exported.serialize(vjp_order=1))
    return Kernel(Program("deserialised", again.call, batches=False), own_params())


def net(params: Any, site: Any, x: Any) -> Any:
    return jnp.tanh(site("layer", linear, params, x))


def planned(kind: str, params: Any, own: Any, x: Any) -> Any:
    kernels = [Kernel(kernel(kind).program, own)]
    chosen = plan(STATE, kernels, SITES)
    return forward(net, chosen, params, gather(STATE, kernels, chosen), x)[0]


def dynamic(kind: str, params: Any, own: Any, x: Any) -> Any:
    bank = make_bank([Kernel(kernel(kind).program, own)])
    return forward_dynamic(net, params, STATE, bank, x, sites=SITES)[0]


def by_hand(kind: str, params: Any, own: Any, x: Any) -> Any:
    """The formula, with the kernel's program by itself."""
    k = kernel(kind).program.apply(own, x)
    return jnp.tanh((1.0 - ALPHA) * linear(params, x) + ALPHA * k)

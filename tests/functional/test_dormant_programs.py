"""Dormant, every kind of host layer compiles to the very program of the bare one."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_functional as ef
from tests.functional.networks import optimised_hlo
from tests.functional.transformers import (
    init_transformer,
    sequences,
    transformer,
    transformer_sites,
)

BLOCKS = 12


class Host(NamedTuple):
    """A network, its sites, its parameters and its input."""

    net: ef.Network
    sites: tuple[str, ...]
    params: Any
    x: Any


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def one_layer(layer: Callable[..., Any], params: Any, *args: Any, **options: Any) -> Host:
    own = ef.seeded(layer, **options)
    return Host(lambda params, site, x: own(params, site, *x), ("layer",), params, args)


def several(kind: str) -> Host:
    if kind == "transformer":
        params = init_transformer(0, BLOCKS)
        return Host(transformer(BLOCKS), transformer_sites(BLOCKS), params, sequences())
    key = jax.random.key(0)
    if kind == "linear":
        return one_layer(ef.linear, ef.init_linear(key, 8, 4), drawn(3, 8))
    if kind == "conv2d":
        params = ef.init_conv2d(key, 3, 4, 3)
        return one_layer(ef.conv2d, params, drawn(2, 3, 6, 6), padding=1, stride=2)
    if kind == "attention":
        params = ef.init_attention(key, 8, 2)
        options = {"num_heads": 2, "causal": True, "need_weights": True}
        return one_layer(ef.attention, params, drawn(2, 5, 8), **options)
    if kind == "layer_norm":
        return one_layer(ef.layer_norm, ef.init_layer_norm(8), drawn(3, 8))
    params, stats = ef.init_batch_norm(8)
    return one_layer(ef.batch_norm, params, drawn(3, 8), stats, train=True)


KINDS = ("linear", "conv2d", "attention", "layer_norm", "batch_norm", "transformer")
every_kind = pytest.mark.parametrize("kind", KINDS)


def sgd(apply: Callable[[Any, Any], Any], params: Any, x: Any) -> Any:
    """A step on the sum of squares of the first result; all results are returned."""

    def loss(params: Any) -> Any:
        y = apply(params, x)
        return jnp.sum((y[0] if isinstance(y, tuple) else y) ** 2), y

    (_, y), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return y, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def bare_of(host: Host) -> Callable[[Any, Any], Any]:
    return lambda params, x: host.net(params, ef.bare, x)


def dormant_of(host: Host) -> Callable[[Any, Any], Any]:
    state = ef.init_seeds(len(host.sites), 4)
    own = ef.plan(state, {}, host.sites)
    live = ef.gather(state, {}, own)
    return lambda params, x: ef.run(host.net, own, params, live, x)[0]


@every_kind
def test_the_forward_pass(kind):
    host = several(kind)
    plain = optimised_hlo(bare_of(host), host.params, host.x)
    assert optimised_hlo(dormant_of(host), host.params, host.x) == plain
    assert "metadata" not in plain


@every_kind
def test_the_training_step(kind):
    host = several(kind)
    plain = optimised_hlo(partial(sgd, bare_of(host)), host.params, host.x)
    assert optimised_hlo(partial(sgd, dormant_of(host)), host.params, host.x) == plain


@every_kind
def test_the_traced_program_too(kind):
    """Before any compiler has simplified it, so on every backend."""
    host = several(kind)
    plain, dormant = (
        jax.make_jaxpr(partial(sgd, apply))(host.params, host.x)
        for apply in (bare_of(host), dormant_of(host))
    )
    assert str(dormant) == str(plain)


def test_the_comparison_sees_one_kernel_in_a_transformer_of_many_blocks():
    """At alpha 0, too, where it changes no number."""
    host = several("transformer")
    place = host.sites.index("7.up")
    state = ef.fold_events(
        ef.init_seeds(len(host.sites), 4),
        [
            ef.Event(0, place, 2, ef.EventKind.LOAD, value=0.0),
            ef.Event(0, place, 2, ef.EventKind.ACTIVATE, value=0.0),
        ],
    )
    kernels = [ef.kernel_from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((16, 64))})]
    own = ef.plan(state, kernels, host.sites)
    live = ef.gather(state, kernels, own)

    def grafted(params: Any, x: Any) -> Any:
        return ef.run(host.net, own, params, live, x)[0]

    plain, other = (
        jax.make_jaxpr(apply)(host.params, host.x) for apply in (bare_of(host), grafted)
    )
    assert str(plain) != str(other)

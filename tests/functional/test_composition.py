"""Grafted networks under jax's transformations: the numbers are those of the formula."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.functional.composed import (
    BATCH,
    IN,
    KINDS,
    OUT,
    PARAMS,
    by_hand,
    dynamic,
    kernel,
    planned,
)
from tests.tolerance import assert_tree_close

GROUPS = 2
MODES = ("planned", "dynamic")
XS = jnp.asarray(np.random.default_rng(1).normal(size=(GROUPS, BATCH, IN)), jnp.float32)
COTANGENT = jnp.asarray(np.random.default_rng(2).normal(size=(GROUPS, BATCH, OUT)), jnp.float32)
RUN = {"planned": planned, "dynamic": dynamic, "by hand": by_hand}


def looped(function, xs):
    return jnp.stack([function(x) for x in xs])


def scanned(function, xs):
    return jax.lax.scan(lambda carry, x: (carry + 1, function(x)), 0, xs)[1]


OVER = {
    "inner jit": lambda function, xs: looped(jax.jit(function), xs),
    "vmap": lambda function, xs: jax.vmap(function)(xs),
    "lax.map": lambda function, xs: jax.lax.map(function, xs),
    "scan": scanned,
    "checkpoint": lambda function, xs: looped(jax.checkpoint(function), xs),
    "scan of checkpoint": lambda function, xs: scanned(jax.checkpoint(function), xs),
}
"""How a function of one group is taken over all of them."""


def with_gradients(mode, over, kind):
    """Outputs of all groups, and gradients of host, kernel and input."""

    def of(params, own, xs):
        ys = OVER[over](lambda x: RUN[mode](kind, params, own, x), xs)
        return jnp.sum(ys * COTANGENT), ys

    def both(params, own, xs):
        (_, ys), grads = jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True)(params, own, xs)
        return ys, grads

    return jax.jit(both)(PARAMS, kernel(kind).params, XS)


expected = cache(partial(with_gradients, "by hand", "inner jit"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_transformation_values_and_gradients_are_the_formulas(kind, over, mode):
    assert_tree_close(with_gradients(mode, over, kind), expected(kind))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_for_each_group_is_that_groups(kind, mode):
    """A map outside of the gradient."""

    def of(mode, own, x, cotangent):
        return jnp.sum(RUN[mode](kind, PARAMS, own, x) * cotangent)

    own = kernel(kind).params
    mapped = jax.vmap(jax.grad(partial(of, mode)), in_axes=(None, 0, 0))
    ours = jax.jit(mapped)(own, XS, COTANGENT)
    for i in range(GROUPS):
        each = jax.grad(partial(of, "by hand"))(own, XS[i], COTANGENT[i])
        assert_tree_close(jax.tree.map(lambda g, i=i: g[i], ours), each)

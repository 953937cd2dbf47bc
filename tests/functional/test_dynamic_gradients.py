"""Gradients of the dynamic mode: those of the planned one, for host, input and every kernel."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import (
    BLENDS,
    bank_kernels,
    bare,
    forward,
    forward_dynamic,
    gather,
    kernel_from_function,
    make_bank,
    plan,
)
from tests.functional.lives import KERNELS, STORIES, bank, lived, pasts, scattered, state_of
from tests.functional.networks import SITES, batch, host_params, mlp
from tests.tolerance import assert_bitwise, assert_tree_close

PARAMS, X, BANK = host_params(), batch(), bank()


def loss(y):
    """A different weight for each output."""
    return jnp.sum(y * jnp.arange(1.0, 1.0 + y.size).reshape(y.shape))


@partial(jax.jit, static_argnames=("blend", "isolate"))
def dynamic(params, bank_params, x, state, *, blend="convex", isolate=False):
    """Gradients of the host's parameters, of the bank's and of the input."""

    def of(params, bank_params, x):
        own = dataclasses.replace(BANK, params=bank_params)
        y, _ = forward_dynamic(
            mlp, params, state, own, x, sites=SITES, blend=blend, isolate=isolate
        )
        return loss(y)

    return jax.grad(of, argnums=(0, 1, 2))(params, bank_params, x)


def planned(params, state, x, kernels=KERNELS, **options):
    """The same three, eagerly; the kernels' in plan order."""
    own = plan(state, kernels, SITES, **options)
    live = gather(state, kernels, own)

    def of(params, own_params, x):
        chosen = live and dataclasses.replace(live, params=own_params)
        return loss(forward(mlp, own, params, chosen, x)[0])

    return jax.grad(of, argnums=(0, 1, 2))(params, live.params if live else (), x)


def assert_same(ours, theirs, state):
    assert_tree_close((ours[0], ours[2]), (theirs[0], theirs[2]))
    assert_tree_close(ours[1], scattered(BANK, state, theirs[1]))


@pytest.mark.parametrize("blend", BLENDS)
@settings(max_examples=25)
@given(pasts(), st.booleans(), st.integers(0, 3))
def test_they_are_the_planned_ones(blend, past, isolate, seed):
    state, x = lived(past), batch(seed)
    options = {"blend": blend, "isolate": isolate}
    assert_same(
        dynamic(PARAMS, BANK.params, x, state, **options),
        planned(PARAMS, state, x, **options),
        state,
    )


def test_two_seeds_of_one_slot_both_reach_it():
    state = state_of((0, 0, "active", 0), (0, 1, "active at 1", 0))
    ours = dynamic(PARAMS, BANK.params, X, state)
    theirs = planned(PARAMS, state, X)
    assert_same(ours, theirs, state)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(theirs[1]))


def test_a_fossil_of_a_slot_that_also_trains_gets_nothing():
    both = state_of((0, 0, "fossil", 0), (0, 1, "active", 0))
    ours = dynamic(PARAMS, BANK.params, X, both)
    theirs = planned(PARAMS, both, X)
    assert_same(ours, theirs, both)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(theirs[1][0]))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(theirs[1][1]))


@pytest.mark.parametrize(
    "story", [name for name in STORIES if name not in {"active", "active at 1", "ramping"}]
)
def test_slots_that_no_seed_trains_get_exactly_zero(story):
    state = state_of((0, 0, story, 0), (0, 1, "active", 1), (1, 1, story, 4))
    _, to_bank, _ = dynamic(PARAMS, BANK.params, X, state)
    trained = {1} | ({0, 4} if story in {"failed twice", "active at 0"} else set())
    code = np.asarray(BANK.code)
    for program, rows in enumerate(to_bank):
        for slot in range(len(code)):
            own = [np.asarray(leaf[slot]) for leaf in jax.tree.leaves(rows)]
            if slot not in trained or code[slot] != program:
                assert not any(g.any() for g in own), slot


def test_the_bank_may_be_differentiated_as_a_whole():
    """A Bank is a pytree; its codes are integers, and get gradients of their own kind."""
    own = make_bank([kernel_from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 4))})])
    state = state_of((0, 0, "active", 0))

    def of(own):
        return loss(forward_dynamic(mlp, PARAMS, state, own, X, sites=SITES)[0])

    to_bank = jax.jit(jax.grad(of, allow_int=True))(own)
    assert to_bank.code.dtype == jax.dtypes.float0
    (theirs,) = planned(PARAMS, state, X, kernels=bank_kernels(own))[1]
    assert_tree_close(jax.tree.map(lambda g: g[0], to_bank.params[0]), theirs)


def test_dormant_gradients_are_the_bare_networks_bit_by_bit():
    plain = jax.jit(jax.grad(lambda p, x: loss(mlp(p, bare, x)), argnums=(0, 1)))(PARAMS, X)
    ours = dynamic(PARAMS, BANK.params, X, lived([]))
    assert_bitwise((ours[0], ours[2]), plain)

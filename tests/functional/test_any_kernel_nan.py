"""Kernels of NaN or infinity, whatever their seed is doing: the host never notices.

The host's parameters and inputs are free of rounding, so that "the same" means every bit,
however a compiler fuses and maps.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    bank_kernels,
    bare,
    forward,
    forward_dynamic,
    gather,
    make_bank,
    plan,
    running,
)
from tests.functional.lives import STORIES, lived, low_rank_kernel, member, stacked, state_of
from tests.functional.networks import (
    SITES,
    dense_kernel,
    exact_batch,
    exact_params,
    filled,
    mlp,
)
from tests.tolerance import assert_bitwise, assert_close, assert_finite

PARAMS, X = exact_params(), exact_batch()
POISONS = {"NaN": np.nan, "inf": np.inf}
BAD, BAD_LINEAR, BAD_OUT, GOOD = 0, 1, 2, 3
HEALTHY = {
    BAD: dense_kernel(0),
    BAD_LINEAR: low_rank_kernel(1),
    BAD_OUT: dense_kernel(2, "out"),
    GOOD: dense_kernel(3),
}
BANK = make_bank(HEALTHY)
RUN = {"active", "active at 0", "active at 1", "ramping", "failed twice", "fossil"}
"""The stories at whose end the kernel runs in the plain forward pass."""


def poisoned(value):
    """The kernels and the bank, all but one kernel of them filled with a value."""
    kernels = {
        slot: kernel if slot == GOOD else filled(kernel, value) for slot, kernel in HEALTHY.items()
    }
    return kernels, make_bank(kernels)


def told(story: str):
    """Two bad kernels at one site and one at the other, all with one story."""
    return state_of((0, 0, story, BAD), (0, 1, story, BAD_LINEAR), (1, 1, story, BAD_OUT))


def with_gradients(function):
    """Output and gradients of the host's parameters and of the input."""

    def of(params, x):
        def loss(params, x):
            y = function(params, x)
            return jnp.sum(y**2), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, grads

    return of


def dynamic_step(params, x, state, bank):
    return with_gradients(lambda p, x: forward_dynamic(mlp, p, state, bank, x, sites=SITES)[0])(
        params, x
    )


dynamic = jax.jit(dynamic_step)
mapped = jax.jit(jax.vmap(dynamic_step))


@partial(jax.jit, static_argnums=0)
def planned_step(own, live, params, x):
    return with_gradients(lambda p, x: forward(mlp, own, p, live, x)[0])(params, x)


def planned(state, kernels):
    own = plan(state, kernels, SITES)
    return planned_step(own, gather(state, kernels, own), PARAMS, X)


plain = jax.jit(with_gradients(lambda p, x: mlp(p, bare, x)))(PARAMS, X)


def in_population(state, bank):
    """The state's result beside members of which every seed runs, and none."""
    others = [state, told("active"), lived([])]
    people = [stacked([each] * 3) for each in (PARAMS, X)]
    return member(mapped(*people, stacked(others), stacked([bank] * 3)), 0)


def every_mode(state, value):
    kernels, bank = poisoned(value)
    return {
        "planned": planned(state, kernels),
        "dynamic": dynamic(PARAMS, X, state, bank),
        "population": in_population(state, bank),
    }


def test_the_stories_that_run_are_the_ones_named():
    for story in STORIES:
        state = told(story)
        assert np.asarray(running(state) & ~state.incubating).any() == (story in RUN), story


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("story", sorted(set(STORIES) - RUN))
def test_where_it_does_not_run_output_and_gradients_are_the_bare_hosts_bit_by_bit(story, poison):
    assert_finite(plain)
    for result in every_mode(told(story), POISONS[poison]).values():
        assert_bitwise(result, plain)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("story", sorted(RUN))
def test_where_it_runs_output_and_gradients_are_finite_and_the_hosts_still_learns(story, poison):
    for result in every_mode(told(story), POISONS[poison]).values():
        assert_finite(result)
    _, bank = poisoned(POISONS["NaN"])
    nothing_left = dynamic(PARAMS, X, told(story), bank)
    assert_close(nothing_left[0], plain[0])
    assert all(np.asarray(g).any() for g in jax.tree.leaves(nothing_left[1][0]))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("story", ["dormant", "loading", "fallback", "incubating", "folded fossil"])
def test_beside_a_healthy_kernel_it_is_as_if_it_were_not_there(story, poison):
    beside = state_of((0, 0, story, BAD), (0, 1, "active", GOOD), (1, 1, story, BAD_OUT))
    alone = state_of((0, 1, "active", GOOD))
    ours = every_mode(beside, POISONS[poison])
    for mode, result in every_mode(alone, POISONS[poison]).items():
        assert_bitwise(ours[mode], result)


@pytest.mark.parametrize("story", ["dormant", "loading", "fallback", "incubating"])
def test_without_containment_too_it_must_run_to_do_harm(story):
    """Mapped, every branch of the dynamic mode is computed, its gradients too."""

    def step(params, x, state, bank):
        def function(params, x):
            return forward_dynamic(mlp, params, state, bank, x, sites=SITES, contain=False)[0]

        return with_gradients(function)(params, x)

    _, bank = poisoned(np.nan)
    states = [told(story), state_of((0, 1, "active", GOOD)), told(story)]
    people = [stacked([each] * 3) for each in (PARAMS, X, bank)]
    many = jax.jit(jax.vmap(step))(people[0], people[1], stacked(states), people[2])
    for i in (0, 2):
        assert_bitwise(member(many, i), plain)
    assert_finite(member(many, 1))


@pytest.mark.parametrize("poison", POISONS)
def test_kernels_that_no_seed_names_may_be_anything(poison):
    state = state_of((0, 1, "active", GOOD))
    kernels, bank = poisoned(POISONS[poison])
    assert_bitwise(planned(state, kernels), planned(state, HEALTHY))
    assert_bitwise(dynamic(PARAMS, X, state, bank), dynamic(PARAMS, X, state, BANK))
    assert_bitwise(in_population(state, bank), in_population(state, BANK))


def test_the_poison_reaches_no_gradient_of_a_healthy_kernel():
    """Even where a bad one runs at the same site, in the same program."""
    state = state_of((0, 0, "active", BAD), (0, 1, "active", GOOD), (1, 0, "active", BAD_OUT))
    _, bank = poisoned(np.nan)

    @jax.jit
    def of_bank(rows):
        own = dataclasses.replace(bank, params=rows)
        y, _ = forward_dynamic(mlp, PARAMS, state, own, X, sites=SITES)
        return jnp.sum(y**2)

    grads = jax.grad(of_bank)(bank.params)
    assert_finite(grads)
    code = int(np.asarray(bank.code)[GOOD])
    assert all(np.asarray(leaf[GOOD]).any() for leaf in jax.tree.leaves(grads[code]))
    assert sorted(bank_kernels(bank)) == sorted(HEALTHY)

"""Populations of growing networks: `jax.vmap` over them is a loop over their members."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import (
    advance,
    bare,
    execute,
    forward,
    forward_dynamic,
    gather,
    make_bank,
    plan,
    put_kernel,
    record_faults,
    shadow_dynamic,
    state_digest,
)
from tests.functional.lives import (
    KERNELS,
    bank,
    lived,
    member,
    pasts,
    stacked,
    state_of,
)
from tests.functional.networks import (
    SITES,
    batch,
    dense_kernel,
    exact_batch,
    exact_params,
    filled,
    host_params,
    mlp,
)
from tests.tolerance import assert_bitwise, assert_tree_close

SIZE = 4
PARAMS, X, BANK = host_params(), batch(), bank()


def executed(params, state, own, x):
    return execute(mlp, params, state, own, x, sites=SITES, step=9)


def step(params, state, own, x):
    """Value, next state and gradients of the host's and the bank's parameters."""

    def of(params, own_params):
        held = type(own)(own.code, own_params, own.programs)
        y, faults = forward_dynamic(mlp, params, state, held, x, sites=SITES)
        return jnp.sum(y**2), faults

    (value, faults), grads = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(
        params, own.params
    )
    return value, record_faults(state, faults, step=9), grads


over_states = jax.jit(jax.vmap(executed, in_axes=(None, 0, None, None)))
one = jax.jit(executed)
over_all = jax.jit(jax.vmap(step))
one_step = jax.jit(step)


def assert_members(mapped, loop):
    for i, own in enumerate(loop):
        assert_tree_close(member(mapped, i), own)


@settings(max_examples=20)
@given(st.lists(pasts(), min_size=SIZE, max_size=SIZE))
def test_over_states(pasts):
    states = [lived(past) for past in pasts]
    mapped = over_states(PARAMS, stacked(states), BANK, X)
    loop = [one(PARAMS, state, BANK, X) for state in states]
    assert_members(mapped, loop)
    for i, (_, after) in enumerate(loop):
        assert state_digest(member(mapped[1], i)) == state_digest(after)


def banks(seed: int):
    """Banks of the same programs, with different parameters in different slots."""
    random = np.random.default_rng(seed)
    held = []
    for i in range(SIZE):
        own = make_bank(KERNELS)
        own = put_kernel(own, int(random.integers(4)), dense_kernel(10 * seed + i))
        own = put_kernel(own, int(random.integers(4, 7)), dense_kernel(10 * seed + i, "out"))
        held.append(own)
    return held


@settings(max_examples=10)
@given(st.lists(pasts(), min_size=SIZE, max_size=SIZE), st.integers(0, 5))
def test_over_parameters_states_banks_and_inputs_with_gradients(pasts, seed):
    members = [
        (host_params(i), lived(past), own, batch(i))
        for i, (past, own) in enumerate(zip(pasts, banks(seed), strict=True))
    ]
    mapped = over_all(*(stacked(column) for column in zip(*members, strict=True)))
    assert_members(mapped, [one_step(*own) for own in members])


def test_a_member_that_is_nan_leaves_the_others_as_they_are():
    states = [state_of((0, 0, "active", 0), (1, 0, "active", 4))] * SIZE
    healthy = [BANK] * SIZE
    poisoned = [put_kernel(BANK, 0, filled(dense_kernel(0), np.nan)), *healthy[1:]]
    people = [stacked([PARAMS] * SIZE), stacked(states)]
    xs = jnp.stack([X] * SIZE)
    bad, good = (over_all(*people, stacked(own), xs) for own in (poisoned, healthy))
    for i in range(1, SIZE):
        assert_bitwise(member(bad, i), member(good, i))
    assert np.asarray(bad[1].error_count).sum() == 1


def test_a_population_in_which_no_seed_runs_is_a_population_of_hosts_bit_by_bit():
    stories = ("dormant", "loading", "fallback", "folded fossil")
    states = [state_of((0, 0, story, 3), (1, 1, story, 6)) for story in stories]
    hosts, xs = (
        stacked([exact_params(i) for i in range(SIZE)]),
        stacked([exact_batch(i) for i in range(SIZE)]),
    )
    value, _, (grads, _) = over_all(hosts, stacked(states), stacked([BANK] * SIZE), xs)

    def plain(params, x):
        return jax.value_and_grad(lambda p: jnp.sum(mlp(p, bare, x) ** 2))(params)

    assert_bitwise((value, grads), jax.jit(jax.vmap(plain))(hosts, xs))


def test_over_populations_of_populations():
    states = [lived([]), state_of((0, 1, "active", 2)), state_of((1, 0, "fossil", 5))]
    grid = stacked([stacked(states), stacked(states[::-1])])
    mapped = jax.jit(
        jax.vmap(jax.vmap(executed, in_axes=(None, 0, None, None)), in_axes=(None, 0, None, 0))
    )(PARAMS, grid, BANK, jnp.stack([batch(0), batch(1)]))
    for i, row in enumerate([states, states[::-1]]):
        assert_members(member(mapped, i), [one(PARAMS, s, BANK, batch(i)) for s in row])


def test_shadows_of_a_population():
    """Each member has its own incubating seed."""
    places = [(0, 0), (0, 1), (1, 0)]
    states = [state_of((i, j, "incubating", 0 if i == 0 else 4)) for i, j in places]

    def shadow(state, layer, seed):
        return shadow_dynamic(mlp, PARAMS, state, BANK, X, (layer, seed), sites=SITES)

    layers, seeds = (jnp.asarray(axis) for axis in zip(*places, strict=True))
    mapped = jax.jit(jax.vmap(shadow))(stacked(states), layers, seeds)
    single = jax.jit(shadow)
    assert_members(mapped, [single(s, i, j) for s, (i, j) in zip(states, places, strict=True)])


@pytest.mark.parametrize("over", ["alphas", "parameters"])
def test_the_planned_mode_maps_over_members_of_one_plan(over):
    state = state_of((0, 0, "ramping", 0), (1, 0, "active", 4))
    own = plan(state, KERNELS, SITES)
    lives = [gather(advance(state, i), KERNELS, own) for i in range(SIZE)]
    hosts = [host_params(i if over == "parameters" else 0) for i in range(SIZE)]

    def run_one(params, live):
        return forward(mlp, own, params, live, X)[0]

    mapped = jax.jit(jax.vmap(run_one))(stacked(hosts), stacked(lives))
    assert_members(mapped, [run_one(p, live) for p, live in zip(hosts, lives, strict=True)])

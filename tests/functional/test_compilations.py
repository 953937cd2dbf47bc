"""What compiles and what does not: programs are keyed by plans, and plans by programs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from esper_functional import (
    Event,
    EventKind,
    advance,
    apply_event,
    execute,
    fold_events,
    gather,
    gather_weights,
    init_seeds,
    plan,
    run,
)
from tests.functional.networks import (
    SITES,
    batch,
    compilations,
    dense_kernel,
    fossilise,
    grafted_state,
    host_params,
    mlp,
)
from tests.tolerance import assert_bitwise

X = batch()
KERNELS = {0: dense_kernel(0), 1: dense_kernel(1), 2: dense_kernel(2, "out")}


@partial(jax.jit, static_argnums=0)
def train_step(planned, params, live, x):
    def loss(params, kernels):
        own = live and dataclasses.replace(live, params=kernels)
        y, after = run(mlp, planned, params, own, x)
        return jnp.mean(y**2), after

    kernels = live.params if live else ()
    (_, after), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, kernels)
    params, kernels = jax.tree.map(lambda p, g: p - 0.1 * g, (params, kernels), grads)
    return params, after and dataclasses.replace(after, params=kernels)


def planned(state, params, x=X):
    """The arguments of `train_step`."""
    own = plan(state, KERNELS, SITES)
    return own, params, gather(state, KERNELS, own), x


def test_the_counter_sees_a_compilation():
    with compilations() as count:
        jax.jit(lambda x: x * 3.25 + 1.5)(X)
        assert count() >= 1


def test_a_ramp_of_a_hundred_steps_compiles_nothing():
    state = grafted_state((0, 0, 0, 0.0), (1, 1, 2, 0.5))
    state = apply_event(state, Event(0, 0, 0, EventKind.RAMP, value=1.0, span=100))
    params, live = train_step(*planned(state, host_params()))
    seen = set()
    with compilations() as count:
        for step in range(1, 101):
            state = advance(state, step)
            again = plan(state, KERNELS, SITES)
            weights = gather_weights(state, again)
            live = dataclasses.replace(
                live, host_weights=weights.host_weights, weights=weights.weights
            )
            params, live = train_step(again, params, live, X)
            seen.add(float(state.alpha[0, 0]))
        assert count() == 0
    assert len(seen) == 100
    assert state.alpha[0, 0] == 1.0


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("slot", [0, 1])
def test_any_seed_and_any_parameters_share_one_program(seed, slot):
    params, other = host_params(), host_params(1)
    train_step(*planned(grafted_state((0, 0, 0, 0.5)), params))
    with compilations() as count:
        train_step(*planned(grafted_state((0, seed, slot, 0.25)), other))
        assert count() == 0


def test_a_life_takes_three_programs_and_a_second_life_none():
    # A batch size of its own, so that no other test has compiled these programs.
    params, x = host_params(), batch(size=11)

    def live_once(seed, slot):
        active = grafted_state((0, seed, slot, 0.3), (0, 1, 1, 0.2))
        for state in (init_seeds(2, 3), active, fossilise(active, 0, seed)):
            train_step(*planned(state, params)[:3], x)

    with compilations() as count:
        live_once(0, 0)
        assert count() == 3
        live_once(0, 1)
        assert count() == 3


def test_executing_the_same_life_again_compiles_nothing():
    params = host_params()
    active = grafted_state((0, 0, 0, 0.3))
    states = [init_seeds(2, 3), active, fossilise(active, 0, 0)]
    first = [execute(mlp, params, state, KERNELS, X, sites=SITES)[0] for state in states]
    with compilations() as count:
        second = [execute(mlp, params, state, KERNELS, X, sites=SITES)[0] for state in states]
        assert count() == 0
    assert_bitwise(second, first)


def test_unloading_returns_to_the_dormant_program():
    active = grafted_state((0, 0, 0, 0.3))
    params = host_params()
    for state in (init_seeds(2, 3), active):
        execute(mlp, params, state, KERNELS, X, sites=SITES)
    emptied = fold_events(active, [Event(1, 0, 0, EventKind.UNLOAD)])
    with compilations() as count:
        execute(mlp, params, emptied, KERNELS, X, sites=SITES)
        assert count() == 0


def test_another_batch_size_is_another_program_of_the_same_plan():
    state, params, more = grafted_state((0, 0, 0, 0.5)), host_params(), batch(size=7)
    train_step(*planned(state, params))
    with compilations() as count:
        train_step(*planned(state, params, more))
        assert count() == 1

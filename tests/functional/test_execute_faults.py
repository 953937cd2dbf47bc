"""Kernels that are not finite: contained in the output, in every gradient, and counted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    BLENDS,
    FAILURES_TO_RECOVERY,
    KasminaException,
    Kernel,
    SeedLifecycleState,
    absorb,
    bare,
    count_faults,
    execute,
    forward,
    gather,
    kernel_from_function,
    linear,
    plan,
    run,
)
from tests.functional.networks import (
    SITES,
    batch,
    dense_kernel,
    filled,
    grafted_state,
    host_params,
    mlp,
)
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

PARAMS, X = host_params(), batch()
GOOD = dense_kernel(0)
BAD = {
    "parameters NaN": filled(GOOD, np.nan),
    "parameters infinite": filled(GOOD, np.inf),
    "finite output of NaN gradient": kernel_from_function(
        # The derivative of sqrt at 0 is infinite, and 0 · inf is NaN.
        lambda p, x: jnp.sqrt(x @ p["w"] * 0.0),
        {"w": jnp.ones((3, 4))},
    ),
}


def root(params, x):
    """NaN for each example with a negative sum, and only for those."""
    return jnp.sqrt(jnp.sum(x, axis=-1, keepdims=True)) * params["w"]


ROOT = kernel_from_function(root, {"w": jnp.linspace(0.5, 2.0, 4)})
SOME_BAD = jnp.asarray([[1, 2, 0], [-3, 1, 1], [0.5, 0.5, 0.5], [2, -1, 0]], jnp.float32)
ROW_OK = np.array([True, False, True, True])


def loss(blend, kernel, state, params, kernel_params, x, isolate=False):
    kernels = {0: Kernel(kernel.program, kernel_params)}
    own = plan(state, kernels, SITES, blend=blend, isolate=isolate)
    return jnp.sum(forward(mlp, own, params, gather(state, kernels, own), x)[0] ** 2)


def gradients(blend, kernel, x, alpha=0.4, **options):
    function = partial(loss, blend, kernel, grafted_state((0, 0, 0, alpha)), **options)
    return jax.jit(jax.grad(function, argnums=(0, 1, 2)))(PARAMS, kernel.params, x)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_kernel_that_is_nan_leaves_the_hosts_output(alpha, blend):
    kernels, state = {0: BAD["parameters NaN"]}, grafted_state((0, 0, 0, alpha))
    own = plan(state, kernels, SITES, blend=blend)
    y, observed = forward(mlp, own, PARAMS, gather(state, kernels, own), X)
    assert bool(observed.faults[0])
    assert_close(y, mlp(PARAMS, bare, X))


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("name", BAD)
def test_no_gradient_is_poisoned(name, blend):
    to_host, _, to_input = gradients(blend, BAD[name], X)
    assert_finite((to_host, to_input))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(to_host))


@pytest.mark.parametrize("blend", BLENDS)
def test_a_nan_kernels_gradients_are_the_bare_networks_and_its_own_are_zero(blend):
    to_host, to_kernel, to_input = gradients(blend, BAD["parameters NaN"], X)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(to_kernel))
    plain = jax.grad(lambda p, x: jnp.sum(mlp(p, bare, x) ** 2), argnums=(0, 1))(PARAMS, X)
    assert_tree_close((to_host, to_input), plain)


@pytest.mark.parametrize("blend", BLENDS)
def test_one_bad_example_is_replaced_and_the_others_are_as_they_would_be_alone(blend):
    kernels, state = {0: ROOT}, grafted_state((0, 0, 0, 0.4))
    own = plan(state, kernels, SITES, blend=blend)
    live = gather(state, kernels, own)
    y, observed = forward(mlp, own, PARAMS, live, SOME_BAD)
    assert bool(observed.faults[0])
    alone, clean = forward(mlp, own, PARAMS, live, SOME_BAD[ROW_OK])
    assert not bool(clean.faults[0])
    assert_close(np.asarray(y)[ROW_OK], alone)
    assert_close(np.asarray(y)[~ROW_OK], mlp(PARAMS, bare, SOME_BAD[~ROW_OK]))


@pytest.mark.parametrize("blend", BLENDS)
def test_one_bad_example_withholds_its_own_input_gradient_and_the_kernels(blend):
    _, to_kernel, to_input = gradients(blend, ROOT, SOME_BAD)
    _, clean_kernel, clean_input = gradients(blend, ROOT, SOME_BAD[ROW_OK])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(to_kernel))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(clean_kernel))
    assert_close(np.asarray(to_input)[ROW_OK], clean_input)
    plain = jax.grad(lambda x: jnp.sum(mlp(PARAMS, bare, x) ** 2))(SOME_BAD[~ROW_OK])
    assert_close(np.asarray(to_input)[~ROW_OK], plain)


def step(state, kernels):
    own = plan(state, kernels, SITES)
    return jax.jit(partial(run, mlp, own)), gather(state, kernels, own)


def test_failures_are_counted_one_two_three_and_then_stay():
    jitted, live = step(grafted_state((0, 1, 0, 0.5)), {0: ROOT})
    counts = []
    for _ in range(5):
        _, live = jitted(PARAMS, live, SOME_BAD)
        counts.append(int(live.errors[0]))
    assert counts == [1, 2, 3, 3, 3]


def test_a_finite_step_starts_the_count_anew():
    jitted, live = step(grafted_state((0, 1, 0, 0.5)), {0: ROOT})
    counts = []
    for x in (SOME_BAD, SOME_BAD, jnp.abs(SOME_BAD), SOME_BAD):
        _, live = jitted(PARAMS, live, x)
        counts.append(int(live.errors[0]))
    assert counts == [1, 2, 0, 1]


def test_a_latched_seed_has_stopped_before_it_is_absorbed():
    state = grafted_state((0, 1, 0, 0.5))
    jitted, live = step(state, {0: ROOT})
    for _ in range(FAILURES_TO_RECOVERY):
        _, live = jitted(PARAMS, live, SOME_BAD)
    fine = jnp.abs(SOME_BAD)
    y, live = jitted(PARAMS, live, fine)
    assert_close(y, mlp(PARAMS, bare, fine))
    assert live.errors.tolist() == [3]
    after = absorb(state, live, step=6)
    assert after.stage[0, 1] == SeedLifecycleState.ERROR_RECOVERY
    assert after.fallback[0, 1]
    assert plan(after, {0: ROOT}, SITES).dormant


def test_only_the_failing_seed_is_counted():
    kernels = {0: ROOT, 1: GOOD, 2: dense_kernel(1, "out")}
    jitted, live = step(grafted_state((0, 0, 1, 0.2), (0, 1, 0, 0.2), (1, 0, 2, 0.2)), kernels)
    _, live = jitted(PARAMS, live, SOME_BAD)
    assert live.errors.tolist() == [0, 1, 0]


def test_a_layer_called_twice_fails_once_in_a_step():
    def twice(params, site, x):
        first = site("hidden", linear, params["hidden"], x)
        return first + site("hidden", linear, params["hidden"], jnp.abs(x))

    state = grafted_state((0, 0, 0, 0.5))
    own = plan(state, {0: ROOT}, SITES)
    _, live = run(twice, own, PARAMS, gather(state, {0: ROOT}, own), SOME_BAD)
    assert live.errors.tolist() == [1]


def test_execute_counts_falls_back_and_goes_on_bare():
    state, counts = grafted_state((0, 0, 0, 0.5)), []
    for i in range(4):
        y, state = execute(mlp, PARAMS, state, {0: ROOT}, SOME_BAD, sites=SITES, step=i)
        counts.append(int(state.error_count[0, 0]))
    assert counts == [1, 2, 3, 3]
    assert state.stage[0, 0] == SeedLifecycleState.ERROR_RECOVERY
    assert state.last_update[0, 0] == 2
    assert_bitwise(y, jax.jit(lambda p, x: mlp(p, bare, x))(PARAMS, SOME_BAD))


def test_faults_of_another_plan_are_not_counted():
    one, two = grafted_state((0, 0, 0, 0.2)), grafted_state((0, 0, 0, 0.2), (1, 1, 2, 0.6))
    kernels = {0: dense_kernel(0), 2: dense_kernel(2, "out")}
    live = gather(one, kernels, plan(one, kernels, SITES))
    other = plan(two, kernels, SITES)
    _, seen = forward(mlp, other, host_params(), gather(two, kernels, other), batch())
    with pytest.raises(KasminaException, match="live part has 1 kernels, and the faults given.*2"):
        count_faults(live, seen.faults)
    with pytest.raises(KasminaException, match=r"the faults given are of \[\]"):
        count_faults(live)

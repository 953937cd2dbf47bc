"""Health on sampled steps: measured in one array, averaged on the host."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    EMA_FACTOR,
    STATISTICS,
    KasminaException,
    activation_variance,
    dead_ratio,
    forward,
    gather,
    health_score,
    init_statistics,
    mean_abs_correlation,
    measure_health,
    observe_statistics,
    plan,
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
from tests.tolerance import assert_bitwise, assert_close

X = batch(size=16)
KERNELS = {0: dense_kernel(0), 2: dense_kernel(2, "out")}
STATE = grafted_state((0, 1, 0, 0.4), (1, 2, 2, 0.6))


def sampled(kernels=KERNELS, state=STATE):
    own = plan(state, kernels, SITES)
    _, seen = forward(mlp, own, host_params(), gather(state, kernels, own), X, capture=True)
    return seen.outputs


def test_a_row_holds_the_statistics_of_one_kernel():
    outputs = sampled()
    measured = jax.jit(measure_health)(outputs)
    assert measured.shape == (2, len(STATISTICS))
    for row, k in zip(measured, outputs, strict=True):
        own = (health_score(k), activation_variance(k), dead_ratio(k), mean_abs_correlation(k))
        assert_close(row, np.stack([np.asarray(value, np.float32) for value in own]))


def test_channels_first_are_the_features_of_images():
    images = jax.random.normal(jax.random.key(0), (5, 3, 4, 4))
    last = jnp.moveaxis(images, 1, -1)
    assert_bitwise(measure_health([images], feature_axis=-3), measure_health([last]))


def test_nothing_runs_and_nothing_is_measured():
    assert measure_health([]).shape == (0, len(STATISTICS))


def test_the_first_observation_is_taken_as_it_is_and_the_next_averaged():
    first, second = measure_health(sampled()), measure_health(sampled()) * 0.5
    state, averages = observe_statistics(STATE, init_statistics(2, 3), first, step=3)
    assert_close(averages.variance[[0, 1], [1, 2]], np.asarray(first)[:, 1])
    assert_close(state.health[[0, 1], [1, 2]], np.asarray(first)[:, 0])
    assert state.last_update[0, 1] == 3
    assert np.isnan(averages.variance).sum() == 4
    state, averages = observe_statistics(state, averages, second, step=4)
    expected = np.asarray(first) + np.float32(EMA_FACTOR) * (np.asarray(second) - np.asarray(first))
    for array, column in zip(
        (state.health, averages.variance, averages.dead_ratio, averages.correlation),
        expected.T,
        strict=True,
    ):
        assert_close(np.asarray(array)[[0, 1], [1, 2]], column)


def test_what_is_not_finite_is_passed_over():
    measured = measure_health(sampled({0: filled(KERNELS[0], np.nan), 2: KERNELS[2]}))
    state, averages = observe_statistics(STATE, init_statistics(2, 3), measured, step=3)
    assert np.isnan(state.health[0, 1])
    assert np.isnan(averages.variance[0, 1])
    assert not np.isnan(state.health[1, 2])


def test_a_seed_that_stopped_running_starts_anew():
    measured = measure_health(sampled())
    _, averages = observe_statistics(STATE, init_statistics(2, 3), measured, step=3)
    other = grafted_state((1, 2, 2, 0.6))
    _, later = observe_statistics(other, averages, measured[1:], step=4)
    assert np.isnan(later.variance[0, 1])
    assert not np.isnan(later.variance[1, 2])


def test_measurements_of_another_plan_are_refused():
    observe = partial(observe_statistics, STATE, init_statistics(2, 3), step=1)
    with pytest.raises(KasminaException, match=r"runs 2 seeds.*\(2, 4\); got \(1, 4\)"):
        observe(measure_health(sampled())[:1])


def test_what_was_not_seen_is_not_measured():
    rows = np.asarray(measure_health([None, jnp.ones((4, 5))]))
    assert np.isnan(rows[0]).all()
    assert not np.isnan(rows[1, 0])

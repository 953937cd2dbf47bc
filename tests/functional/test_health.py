"""Health statistics against numpy's own formulas, on both backends."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import (
    TOLERANCES,
    activation_variance,
    dead_ratio,
    health_score,
    mean_abs_correlation,
)
from tests.tolerance import assert_close

ALL = [activation_variance, dead_ratio, health_score, mean_abs_correlation]
BACKENDS = {"numpy": np.asarray, "jax": jnp.asarray}
shapes = st.sampled_from([(8, 4), (2, 1), (5, 3, 4), (16, 2)])
seeds = st.integers(0, 10_000)


def outputs(seed: int, shape: tuple[int, ...] = (8, 4)) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=shape) * random.uniform(0.1, 3.0, shape[-1])).astype(np.float32)


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).astype(np.float64)


def f32(value: float) -> np.ndarray:
    return np.asarray(value, np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(seeds, shapes)
def test_variance_is_numpys(backend, seed, shape):
    x = outputs(seed, shape)
    found = activation_variance(BACKENDS[backend](x))
    assert_close(found, f32(np.var(rows(x), axis=0).mean()))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(seeds, shapes, st.integers(0, 4))
def test_the_dead_ratio_counts_features_that_do_not_vary(backend, seed, shape, dead):
    x = outputs(seed, shape)
    dead = min(dead, shape[-1])
    x[..., :dead] = 0.25
    x = BACKENDS[backend](x)
    assert_close(dead_ratio(x), f32(dead / shape[-1]))
    assert_close(health_score(x), f32(1 - dead / shape[-1]))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(seeds, st.sampled_from([2, 5]))
def test_correlation_is_numpys_off_its_diagonal(backend, seed, features):
    x = outputs(seed, (12, features))
    matrix = np.abs(np.corrcoef(rows(x), rowvar=False))
    expected = matrix[~np.eye(features, dtype=bool)].mean()
    assert_close(mean_abs_correlation(BACKENDS[backend](x)), f32(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_correlate_fully_and_dead_or_single_features_not_at_all(backend):
    array = BACKENDS[backend]
    x = outputs(0, (32, 1))
    assert_close(mean_abs_correlation(array(np.concatenate([x, -2 * x, 3 * x], 1))), f32(1.0))
    assert_close(mean_abs_correlation(array(x)), f32(0.0))
    with_dead = np.concatenate([x, x, np.zeros_like(x)], axis=1)
    assert_close(mean_abs_correlation(array(with_dead)), f32(2 / 6))
    assert_close(mean_abs_correlation(array(np.zeros((4, 3), np.float32))), f32(0.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_score_of_outputs_that_are_not_finite_is_nan(backend, bad):
    x = outputs(0)
    x[3, 1] = bad
    with np.errstate(invalid="ignore"):
        found = np.asarray(health_score(BACKENDS[backend](x)))
    assert found.dtype == np.float32
    assert np.isnan(found)


@pytest.mark.parametrize("statistic", ALL)
@settings(max_examples=20)
@given(seeds, shapes)
def test_both_backends_report_the_same(statistic, seed, shape):
    x = outputs(seed, shape)
    assert_close(statistic(jnp.asarray(x)), np.asarray(statistic(x)))


@pytest.mark.parametrize("statistic", ALL)
def test_leading_axes_are_one_batch(statistic):
    x = outputs(3, (2, 5, 4))
    assert_close(statistic(jnp.asarray(x)), statistic(jnp.asarray(x.reshape(10, 4))))


@pytest.mark.parametrize("statistic", ALL)
def test_half_precision_gives_single_precision(statistic):
    assert statistic(jnp.asarray(outputs(0), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("statistic", [dead_ratio, mean_abs_correlation, health_score])
@settings(max_examples=20)
@given(seeds, shapes)
def test_shares_are_in_the_unit_interval(statistic, seed, shape):
    value = float(statistic(jnp.asarray(outputs(seed, shape))))
    # A full correlation is a sum of rounded products.
    assert 0.0 <= value <= 1.0 + TOLERANCES["float32"].absolute


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_constant_is_dead(backend):
    x = np.full((100, 2), 1234.567, np.float32)
    assert_close(dead_ratio(BACKENDS[backend](x)), f32(1.0))

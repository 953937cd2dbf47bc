"""The statistics of comparisons, against simulations, enumerations and laws."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from esper.tolaria.comparison import (
    bootstrap_interval,
    fewest_pairs,
    holm,
    minimal_effect,
    paired_power,
    pairs_needed,
    sign_flip_p,
)
from esper.tolaria.comparison._interval import widened

REPEATS = 1_000

# Differences of a mean that is known, as `[repeats, n]`, by the kind of data.


def normal(random, shape):
    return random.normal(size=shape)


def skewed(random, shape):
    return random.exponential(size=shape) - 1.0


def tied(random, shape):
    """Of two accuracies over 192 examples near 97 %, on a grid on which sums are exact."""
    return (random.binomial(192, 0.97, shape) - random.binomial(192, 0.97, shape)) / 256.0


def mostly_zero(random, shape):
    return (random.binomial(2, 0.1, shape) - random.binomial(2, 0.1, shape)) / 256.0


def coverage(draw, count: int, level: float, repeats: int = REPEATS) -> float:
    sample = draw(np.random.default_rng(20_260), (repeats, count))
    low, high = bootstrap_interval(sample, level, resamples=1_999)
    # A mean of 0 is on the grid of the samples, and an end of an interval is not.
    return float(np.mean((low <= 1e-12) & (high >= -1e-12)))


# Intervals


@pytest.mark.parametrize(
    ("draw", "count", "recorded"),
    [
        # Recorded from 4,000 repeats of another seed; what the report says of coverage is these.
        (normal, 6, 0.931), (normal, 10, 0.943), (normal, 20, 0.944),
        (skewed, 6, 0.906), (skewed, 10, 0.922), (skewed, 20, 0.936),
        (tied, 6, 0.935), (tied, 10, 0.951), (tied, 20, 0.944),
        (mostly_zero, 6, 0.998), (mostly_zero, 10, 0.965), (mostly_zero, 20, 0.939),
    ],
)  # fmt: skip
def test_an_interval_of_95_per_cent_covers_as_recorded(draw, count, recorded):
    error = np.sqrt(recorded * (1 - recorded) * (1 / REPEATS + 1 / 4_000))
    # Three standard errors, and a tie of an interval's end with the mean.
    assert coverage(draw, count, 0.95) == pytest.approx(recorded, abs=3 * error + 0.002)


def test_without_widening_an_interval_covers_too_little():
    sample = normal(np.random.default_rng(20_260), (REPEATS, 8))
    found = stats.bootstrap(
        (sample,), np.mean, axis=-1, n_resamples=1_999, rng=np.random.default_rng(0)
    ).confidence_interval
    plain = np.mean((found.low <= 0) & (found.high >= 0))
    assert plain < 0.91 < coverage(normal, 8, 0.95)


def test_the_widened_quantile_is_that_of_student_and_the_variance():
    quantile = stats.norm.isf((1.0 - widened(0.95, 8)) / 2.0)
    assert quantile == pytest.approx(np.sqrt(8 / 7) * stats.t.isf(0.025, 7))
    assert widened(0.95, 100_000) == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.25, -1.0])
def test_where_all_values_are_the_same_the_interval_is_that_value(value):
    # BCa divides 0 by 0 there.
    low, high = bootstrap_interval(np.full(9, value), 0.95)
    assert (low, high) == (value, value)


def test_degenerate_samples_stand_beside_others():
    mixed = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 5.0]])
    low, high = bootstrap_interval(mixed, 0.95)
    assert (low[0], high[0]) == (0.0, 0.0)
    assert low[1] < 2.75 < high[1]
    # Rows of a batch share what is drawn for one alone.
    assert (low[1], high[1]) == bootstrap_interval(mixed[1], 0.95)


def test_an_interval_takes_two_values():
    with pytest.raises(ValueError, match="takes at least 2 values, got 1; make more runs"):
        bootstrap_interval(np.array([1.0]), 0.95)


# Tests


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8))
def test_the_sign_flip_test_is_the_enumeration_of_signs(values):
    sample = np.array(values, dtype=np.float64)
    flips = np.array(list(itertools.product((-1, 1), repeat=len(values))))
    sums = flips @ sample
    assert sign_flip_p(sample) == pytest.approx(np.mean(np.abs(sums) >= abs(sample.sum())))
    assert sign_flip_p(sample, "greater") == pytest.approx(np.mean(sums >= sample.sum()))
    assert sign_flip_p(sample, "less") == pytest.approx(np.mean(sums <= sample.sum()))


def test_beyond_sixteen_pairs_signs_are_drawn_and_p_is_never_0():
    sample = np.full(40, 1.0)
    assert sign_flip_p(sample) == pytest.approx(2 / 100_000)
    assert sign_flip_p(sample, "greater") == pytest.approx(1 / 100_000)
    random = np.random.default_rng(3).integers(-50, 60, 24).astype(np.float64)
    by_student = stats.ttest_1samp(random, 0.0).pvalue
    assert sign_flip_p(random) == pytest.approx(by_student, abs=0.01)


@pytest.mark.parametrize(("level", "fewest"), [(0.05, 6), (0.05 / 3, 7), (0.05 / 6, 8), (0.4, 3)])
def test_the_fewest_pairs_are_those_that_can_reach_the_level(level, fewest):
    assert fewest_pairs(level) == fewest
    assert sign_flip_p(np.ones(fewest)) <= level < sign_flip_p(np.ones(fewest - 1))


@pytest.mark.parametrize("draw", [normal, tied, mostly_zero])
def test_p_values_are_at_most_alpha_no_more_often_than_alpha(draw):
    sample = draw(np.random.default_rng(5), (4_000, 8))
    p = sign_flip_p(sample)
    for alpha in (0.01, 0.05, 0.2):
        assert np.mean(p <= alpha) <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 4_000)


# Several


def test_holm_by_hand():
    # Holm's own scheme: 4 × 0.005, 3 × 0.01, 2 × 0.03, and 0.04 made no smaller than that.
    found = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02])


probabilities = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=7).map(np.array)


@given(probabilities)
def test_holm_keeps_order_and_lies_between_none_and_bonferroni(p):
    found = holm(p)
    assert np.all(p <= found)
    assert np.all(found <= np.minimum(len(p) * p.max(), 1.0))
    assert np.all(np.diff(found[np.argsort(p, kind="stable")]) >= 0.0)
    assert found.min() == pytest.approx(min(1.0, len(p) * p.min()))


@given(probabilities, st.randoms(use_true_random=False))
def test_holm_does_not_care_for_the_order_of_tests(p, random):
    order = list(range(len(p)))
    random.shuffle(order)
    np.testing.assert_array_equal(holm(p[order]), holm(p)[order])


@given(probabilities, st.floats(0.001, 0.4))
def test_holm_rejects_what_the_stepwise_procedure_rejects(p, alpha):
    rejected = np.zeros(len(p), dtype=bool)
    for place, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] * (len(p) - place) > alpha:
            break
        rejected[i] = True
    np.testing.assert_array_equal(holm(p) <= alpha, rejected)


@pytest.mark.parametrize("draw", [normal, skewed, tied])
def test_false_claims_over_five_controls_are_at_most_alpha(draw):
    # Under the null each arm has runs of one distribution; all are compared with one treatment.
    repeats, controls = 2_000, 5
    runs = draw(np.random.default_rng(11), (repeats, controls + 1, 8))
    runs = np.rint(runs * 2**20) / 2**20
    p = sign_flip_p(runs[:, :1] - runs[:, 1:])
    assert p.shape == (repeats, controls)
    false = np.mean((holm(p) <= 0.05).any(axis=-1))
    assert false <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / repeats)
    # Uncorrected, the same tests make several times as many.
    assert np.mean((p <= 0.05).any(axis=-1)) > 0.1


# Power


@pytest.mark.parametrize(
    ("effect", "count", "level"), [(0.5, 10, 0.05), (1.0, 8, 0.01), (2.0, 6, 0.05), (0.0, 12, 0.05)]
)
def test_power_is_how_often_the_t_test_finds_the_effect(effect, count, level):
    repeats = 6_000
    sample = np.random.default_rng(13).normal(effect, 1.0, (repeats, count))
    found = np.mean(stats.ttest_1samp(sample, 0.0, axis=-1).pvalue <= level)
    power = paired_power(effect, 1.0, count, level)
    assert found == pytest.approx(power, abs=3 * np.sqrt(power * (1 - power) / repeats) + 1e-9)


@pytest.mark.parametrize(("effect", "count"), [(0.5, 10), (1.0, 10), (0.8, 12)])
def test_the_sign_flip_test_has_about_that_power(effect, count):
    sample = np.rint(np.random.default_rng(17).normal(effect, 1.0, (1_000, count)) * 2**20)
    found = np.mean(sign_flip_p(sample) <= 0.05)
    assert found == pytest.approx(paired_power(effect, 1.0, count, 0.05), abs=0.05)


@given(
    st.floats(0.01, 50.0), st.integers(3, 1_500), st.sampled_from([0.05, 0.01, 0.001, 1e-6]),
    st.floats(1e-6, 1e6),
)  # fmt: skip
def test_power_is_a_probability_and_knows_only_effect_over_spread(effect, count, level, scale):
    power = paired_power(effect, 1.0, count, level)
    assert level <= power + 1e-9 <= 1.0 + 2e-9
    assert paired_power(effect * scale, scale, count, level) == pytest.approx(power, abs=1e-6)
    assert paired_power(-effect, 1.0, count, level) == power
    assert paired_power(1.5 * effect, 1.0, count, level) >= power - 1e-9


def test_power_goes_over_from_student_to_normal_without_a_jump():
    assert paired_power(0.1, 1.0, 1_000, 0.05) == pytest.approx(
        paired_power(0.1, 1.0, 1_001, 0.05), abs=2e-3
    )


def test_without_spread_every_effect_is_found():
    assert paired_power(0.01, 0.0, 6, 0.05) == 1.0
    assert paired_power(0.0, 0.0, 6, 0.05) == 0.05
    assert minimal_effect(0.0, 6, 0.05) == 0.0
    assert pairs_needed(0.01, 0.0, 0.05, 6) == 6


@pytest.mark.parametrize("count", [3, 6, 10, 50])
@pytest.mark.parametrize("level", [0.05, 0.005])
def test_the_minimal_effect_is_found_in_four_of_five(count, level):
    effect = minimal_effect(0.02, count, level)
    assert paired_power(effect, 0.02, count, level) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("effect", "level"), [(0.3, 0.05), (1.0, 0.01), (3.0, 0.05)])
def test_the_pairs_needed_are_the_fewest(effect, level):
    needed = pairs_needed(effect, 1.0, level)
    assert needed is not None
    assert paired_power(effect, 1.0, needed, level) >= 0.8
    assert needed == 3 or paired_power(effect, 1.0, needed - 1, level) < 0.8
    assert pairs_needed(effect, 1.0, level, fewest=needed + 7) == needed + 7


def test_a_published_number_of_pairs():
    # d_z = 0.5, two-sided 0.05, power 0.8: 34 pairs (Cohen, 1988; G*Power).
    assert pairs_needed(0.5, 1.0, 0.05) == 34


def test_an_effect_too_small_for_any_number_of_pairs():
    assert pairs_needed(1e-4, 1.0, 0.05) is None

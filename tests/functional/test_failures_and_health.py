"""Consecutive failures, and the moving averages of health and latency."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_functional import (
    EMA_FACTOR,
    FAILURES_TO_RECOVERY,
    NO_SLOT,
    TOLERANCES,
    SeedLifecycleState,
    SeedState,
    health_score,
    incubate,
    init_seeds,
    observe_health,
    record_error,
    record_errors,
    record_success,
    running,
    start_ramp,
)
from tests.tolerance import assert_bitwise, assert_close

S = SeedLifecycleState
WHERE = np.ones((1, 1), np.bool_)
scores = st.floats(0.0, 1.0, width=32)


def at(stage: SeedLifecycleState, shape: tuple[int, ...] = (1, 1)) -> SeedState:
    """All seeds in one stage, with a kernel each."""
    return init_seeds(*shape).replace(
        stage=np.full(shape, int(stage), np.uint8), slot=np.zeros(shape, np.int32)
    )


def fail(state: SeedState, times: int) -> SeedState:
    for step in range(1, times + 1):
        state = record_error(state, WHERE, step=step)
    return state


def test_the_third_consecutive_failure_falls_back_and_recovers():
    seen = []
    state = at(S.ACTIVE)
    for step in (1, 2, 3):
        state = record_error(state, WHERE, step=step)
        seen.append((int(state.error_count[0, 0]), S(state.stage[0, 0]), bool(state.fallback)))
    assert seen == [(1, S.ACTIVE, False), (2, S.ACTIVE, False), (3, S.ERROR_RECOVERY, True)]
    assert not running(state).any()
    assert state.last_update[0, 0] == FAILURES_TO_RECOVERY == 3


def test_it_keeps_its_kernel_and_alpha_and_loses_its_ramp():
    state = at(S.ACTIVE).replace(
        slot=np.full((1, 1), 5, np.int32), alpha=np.full((1, 1), 0.5, np.float32)
    )
    after = fail(start_ramp(state, WHERE, 1.0, 10, step=0).state, 3)
    assert (after.slot[0, 0], after.alpha[0, 0]) == (5, 0.5)
    for name in ("ramp_from", "ramp_to", "ramp_start", "ramp_span"):
        assert not getattr(after, name).any()


def test_a_success_starts_the_count_anew():
    state = record_success(fail(at(S.ACTIVE), 2), WHERE, step=9)
    assert (state.error_count[0, 0], state.last_update[0, 0]) == (0, 9)
    assert S(fail(state, 2).stage[0, 0]) is S.ACTIVE
    assert S(fail(state, 3).stage[0, 0]) is S.ERROR_RECOVERY


def test_a_fossil_keeps_its_stage_and_stops_running():
    state = fail(at(S.FOSSILIZED), 3)
    assert S(state.stage[0, 0]) is S.FOSSILIZED
    assert state.fallback.all()
    assert not running(state).any()


def test_a_fossil_that_was_folded_into_its_host_counts_nothing():
    folded = at(S.FOSSILIZED).replace(slot=np.full((1, 1), NO_SLOT, np.int32))
    assert not running(folded).any()
    assert_bitwise(fail(folded, 3), folded)


def test_an_incubating_seed_that_fails_three_times_incubates_no_more():
    state, refused = incubate(at(S.ACTIVE), WHERE, step=0)
    assert not refused.any()
    assert fail(state, 2).incubating.all()
    failed = fail(state, 3)
    assert S(failed.stage[0, 0]) is S.ERROR_RECOVERY
    assert not failed.incubating.any()


@pytest.mark.parametrize("stage", [S.DORMANT, S.LOADING, S.ERROR_RECOVERY])
def test_seeds_that_do_not_run_cannot_fail_or_succeed(stage):
    state = at(stage).replace(error_count=np.full((1, 1), 2, np.int32))
    assert_bitwise(record_error(state, WHERE, step=1), state)
    assert_bitwise(record_success(state, WHERE, step=1), state)


def test_a_seed_in_fallback_counts_no_more():
    state = fail(at(S.FOSSILIZED), 3)
    assert_bitwise(record_error(state, WHERE, step=8), state)
    assert_bitwise(record_success(state, WHERE, step=8), state)


@given(st.lists(st.booleans(), max_size=12))
def test_recovery_comes_exactly_with_three_failures_in_a_row(outcomes):
    state, in_a_row, failed = at(S.ACTIVE), 0, False
    for step, bad in enumerate(outcomes):
        state = (record_error if bad else record_success)(state, WHERE, step=step)
        in_a_row = in_a_row + 1 if bad else 0
        failed = failed or in_a_row == 3
    assert bool(state.fallback[0, 0]) == failed
    assert S(state.stage[0, 0]) is (S.ERROR_RECOVERY if failed else S.ACTIVE)


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_counts_of_a_whole_row_are_set_at_once(counts):
    state = record_errors(
        at(S.ACTIVE, (1, 3)), np.ones((1, 3), np.bool_), np.array([counts], np.int32), step=4
    )
    assert state.error_count.tolist() == [counts]
    assert state.fallback.tolist() == [[count >= 3 for count in counts]]


@given(scores, st.floats(0.0, 1e6, width=32))
def test_the_first_observation_is_taken_as_it_is(health, latency):
    state = observe_health(at(S.ACTIVE), WHERE, health, step=5, latency=latency)
    assert state.health[0, 0] == np.float32(health)
    assert state.latency[0, 0] == np.float32(latency)
    assert state.last_update[0, 0] == 5


@given(st.lists(scores, min_size=1, max_size=10))
def test_later_ones_enter_with_factor_a_tenth(observations):
    assert EMA_FACTOR == 0.1
    state = at(S.ACTIVE)
    for step, score in enumerate(observations):
        state = observe_health(state, WHERE, score, step=step, latency=score * 50)
    average = observations[0]
    for score in observations[1:]:
        average = 0.9 * average + 0.1 * score
    assert_close(state.health, np.array([[average]], np.float32))
    assert_close(state.latency, np.array([[average * 50]], np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_observations_that_are_not_finite_are_passed_over(bad):
    fresh = at(S.ACTIVE)
    assert_bitwise(observe_health(fresh, WHERE, float(bad), step=3, latency=float(bad)), fresh)
    state = observe_health(fresh, WHERE, 0.5, step=1, latency=8.0)
    assert_bitwise(observe_health(state, WHERE, float(bad), step=3), state)
    # A score without a usable latency still counts, and the other way about.
    mixed = observe_health(state, WHERE, 1.0, step=3, latency=float(bad))
    assert_close(mixed.health, np.array([[0.55]], np.float32))
    assert mixed.latency[0, 0] == 8.0


def test_without_a_latency_it_stays():
    state = observe_health(at(S.ACTIVE), WHERE, 0.5, step=1, latency=8.0)
    assert_bitwise(observe_health(state, WHERE, 0.7, step=2).latency, state.latency)


@given(st.lists(scores, min_size=1, max_size=10))
def test_the_average_stays_between_the_extremes(observations):
    state = at(S.ACTIVE)
    for score in observations:
        state = observe_health(state, WHERE, score, step=0)
    slack = TOLERANCES["float32"].absolute
    assert min(observations) - slack <= state.health[0, 0] <= max(observations) + slack


def test_each_seed_has_its_own_average():
    state = at(S.ACTIVE, (2, 2))
    where = np.array([[True, False], [True, True]])
    values = np.arange(4, dtype=np.float32).reshape(2, 2) / 4
    after = observe_health(state, where, values, step=6)
    assert_close(after.health, np.where(where, values, np.float32(np.nan)))
    assert after.last_update.tolist() == [[6, 0], [6, 6]]
    assert_bitwise(jax.tree.map(lambda a: a[0, 1], after), jax.tree.map(lambda a: a[0, 1], state))


@pytest.mark.parametrize("width", [2, 3, 5, 6, 7, 10, 24, 48, 100, 384])
def test_a_score_stays_in_its_interval_in_programs_too(width):
    """A compiler may contract it, and leave 0 or 1 by a rounding: inwards alone."""
    dead = np.zeros((256, width), np.float32)
    alive = np.random.default_rng(0).normal(size=(256, width)).astype(np.float32)
    for score in (health_score, jax.jit(health_score)):
        assert 0.0 <= float(score(jnp.asarray(dead))) <= 1e-6
        assert 1.0 - 1e-6 <= float(score(jnp.asarray(alive))) <= 1.0

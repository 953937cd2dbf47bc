"""Alpha: set at once or run along a ramp, only while ACTIVE and only within [0, 1]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    RampShape,
    SeedLifecycleState,
    SeedState,
    advance,
    apply_event,
    init_seeds,
    observe_health,
    set_alpha,
    start_ramp,
    state_digest,
    transition,
)
from tests.tolerance import assert_bitwise, assert_tree_close

unit = st.floats(0.0, 1.0, width=32)
spans = st.integers(1, 300)
shapes = st.sampled_from(RampShape)
WHERE = np.ones((1, 1), np.bool_)


def active(alpha: float, shape: tuple[int, ...] = (1, 1)) -> SeedState:
    where = np.ones(shape, np.bool_)
    state = transition(init_seeds(*shape), where, SeedLifecycleState.LOADING, step=0, slot=0).state
    return transition(state, where, SeedLifecycleState.ACTIVE, step=0, alpha=alpha).state


def ramping(
    first: float, last: float, span: int, start: int = 10, shape: RampShape = RampShape.LINEAR
) -> SeedState:
    state, refused = start_ramp(active(first), WHERE, last, span, step=start, shape=shape)
    assert not refused.any()
    return state


def at_stage(stage: SeedLifecycleState) -> SeedState:
    return init_seeds(1, 1).replace(stage=np.full((1, 1), int(stage), np.uint8))


@given(unit, unit, spans, shapes)
def test_both_ends_are_exact(first, last, span, shape):
    state = ramping(first, last, span, shape=shape)
    assert state.alpha[0, 0] == np.float32(first)
    assert advance(state, 10).alpha[0, 0] == np.float32(first)
    for late in (0, 1, 1000):
        done = advance(state, 10 + span + late)
        assert done.alpha[0, 0] == np.float32(last)
        assert done.ramp_span[0, 0] == done.ramp_shape[0, 0] == 0
        assert done.last_update[0, 0] == 10 + span


@settings(max_examples=25)
@given(unit, unit, spans, shapes)
def test_it_is_monotone_and_never_leaves_its_ends(first, last, span, shape):
    state = ramping(first, last, span, shape=shape)
    path = np.array([advance(state, 10 + i).alpha[0, 0] for i in range(span + 1)])
    steps = np.diff(path) * (1 if last >= first else -1)
    assert (steps >= 0).all()
    assert (path >= min(first, last)).all()
    assert (path <= max(first, last)).all()


@given(unit, unit, spans, st.integers(0, 350))
def test_it_is_linear(first, last, span, elapsed):
    alpha = advance(ramping(first, last, span), 10 + elapsed).alpha
    part = min(elapsed / span, 1.0)
    expected = np.array([[first + (last - first) * part]], np.float32)
    assert_tree_close(alpha, expected)


@pytest.mark.parametrize("span", [1, 7, 300, 4_096, 1_000_000])
def test_the_curves_are_what_they_are_called(span):
    """Within half a step of the table, which is finer than the ramp up to 4,096 steps."""
    t = np.arange(span + 1)[:: max(1, span // 999)] / span
    logistic = 1 / (1 + np.exp(-12 * (t - 0.5)))
    ends = 1 / (1 + np.exp(np.array([6.0, -6.0])))
    expected = {
        RampShape.LINEAR: t,
        RampShape.COSINE: (1 - np.cos(np.pi * t)) / 2,
        RampShape.SIGMOID: (logistic - ends[0]) / (ends[1] - ends[0]),
    }
    for shape, curve in expected.items():
        state = ramping(0.0, 1.0, span, start=0, shape=shape)
        path = [advance(state, round(part * span)).alpha[0, 0] for part in t]
        # The steepest of them rises by 3 over a ramp.
        assert np.abs(path - curve).max() <= 3.1 / 4_096


def test_a_ramp_has_a_shape_by_name_in_events_too():
    event = Event(10, 0, 0, EventKind.RAMP, value=1.0, span=7, shape="cosine")
    assert_bitwise(apply_event(active(0.0), event), ramping(0.0, 1.0, 7, shape=RampShape.COSINE))
    turned = set_alpha(apply_event(active(0.0), event), WHERE, 0.5, step=12).state
    assert turned.ramp_shape[0, 0] == 0
    with pytest.raises(KasminaException, match=r"unknown shape of a ramp 'cosin'.*'cosine'\?"):
        Event(10, 0, 0, EventKind.RAMP, value=1.0, span=7, shape="cosin")
    with pytest.raises(KasminaException, match="expected one of linear, cosine, sigmoid"):
        start_ramp(active(0.0), WHERE, 1.0, 7, step=10, shape=3)


def test_shapes_enter_a_digest_only_where_they_are_not_linear():
    linear, cosine = (ramping(0.0, 1.0, 7, shape=shape) for shape in list(RampShape)[:2])
    assert state_digest(linear) != state_digest(cosine)
    assert state_digest(advance(linear, 17)) == state_digest(advance(cosine, 17))


@given(unit, unit, spans, shapes, st.lists(st.integers(0, 400), max_size=6), st.integers(0, 400))
def test_advance_is_idempotent_and_independent_of_the_steps_visited(
    first, last, span, shape, visited, step
):
    state = ramping(first, last, span, shape=shape)
    direct = advance(state, step)
    assert_bitwise(advance(direct, step), direct)
    wandered = state
    for earlier in sorted(v for v in visited if v <= step):
        wandered = advance(wandered, earlier)
    assert_bitwise(advance(wandered, step), direct)


def test_advance_before_the_start_and_without_a_ramp_change_nothing():
    state = ramping(0.25, 1.0, 10)
    assert_bitwise(advance(state, 3), state)
    assert_bitwise(advance(active(0.5), 100), active(0.5))


def test_a_ramp_starts_from_where_the_last_one_stands():
    half = advance(ramping(0.0, 1.0, 10), 15)
    turned = start_ramp(half, WHERE, 0.0, 5, step=15).state
    assert turned.ramp_from[0, 0] == half.alpha[0, 0] == np.float32(0.5)
    assert advance(turned, 20).alpha[0, 0] == 0.0


@given(unit)
def test_setting_alpha_ends_a_ramp(value):
    state, refused = set_alpha(ramping(0.0, 1.0, 10), WHERE, value, step=12)
    assert not refused.any()
    assert_bitwise(state, active(value).replace(last_update=np.full((1, 1), 12, np.int32)))
    assert_bitwise(advance(state, 500), state)


@pytest.mark.parametrize("bad", [-1e-6, 1.0000001, 2.0, np.nan, np.inf, -np.inf])
def test_values_outside_the_unit_interval_are_refused_and_change_nothing(bad):
    for state in (active(0.5), ramping(0.0, 1.0, 10)):
        for outcome in (
            set_alpha(state, WHERE, float(bad), step=12),
            start_ramp(state, WHERE, float(bad), 10, step=12),
        ):
            assert outcome.refused.all()
            assert_bitwise(outcome.state, state)


@pytest.mark.parametrize("span", [0, -1])
def test_a_ramp_without_length_is_refused(span):
    outcome = start_ramp(active(0.5), WHERE, 1.0, span, step=0)
    assert outcome.refused.all()
    assert_bitwise(outcome.state, active(0.5))


@pytest.mark.parametrize("stage", [s for s in SeedLifecycleState if s.name != "ACTIVE"])
def test_only_active_seeds_have_an_alpha_to_set(stage):
    state = at_stage(stage)
    for outcome in (
        set_alpha(state, WHERE, 0.5, step=1),
        start_ramp(state, WHERE, 0.5, 10, step=1),
    ):
        assert outcome.refused.all()
        assert_bitwise(outcome.state, state)


def test_each_value_of_an_array_is_judged_by_itself_and_only_where_asked():
    values = np.array([[0.5, 1.5, np.nan, 0.75]], np.float32)
    where = np.array([[True, True, True, False]])
    state, refused = set_alpha(active(0.25, (1, 4)), where, values, step=1)
    assert refused.tolist() == [[False, True, True, False]]
    assert state.alpha.tolist() == [[0.5, 0.25, 0.25, 0.25]]


def test_a_ramp_in_a_jitted_step_is_the_hosts():
    state = ramping(0.125, 0.875, 7)
    jitted = jax.jit(advance)
    for step in range(8, 20):
        assert_tree_close(jitted(state, jnp.asarray(step, jnp.int32)), advance(state, step))


def test_numpy_and_a_jitted_program_agree_to_the_last_bit():
    """Where a compiler contracts a product and a sum, about one in twenty differ by one."""
    random = np.random.default_rng(0)
    shape = (1, 20_000)
    first, last, new = (random.random(shape).astype(np.float32) for _ in range(3))
    state = init_seeds(*shape).replace(
        stage=np.full(shape, 2, np.uint8),
        slot=np.zeros(shape, np.int32),
        alpha=first,
        ramp_from=first,
        ramp_to=last,
        ramp_span=random.integers(2, 300, shape).astype(np.int32),
        ramp_shape=random.integers(0, 3, shape).astype(np.uint8),
        health=last,
    )

    def step(state, now=1):
        return observe_health(advance(state, now), state.stage == 2, new, step=1, latency=first)

    theirs = jax.jit(step)(jax.tree.map(jnp.asarray, state))
    assert_bitwise(jax.tree.map(np.asarray, theirs), step(state))


def test_a_step_may_be_traced_where_the_state_is_not():
    state = ramping(0.25, 0.75, 8)
    theirs = jax.jit(lambda step: advance(state, step))(jnp.int32(14))
    assert_bitwise(jax.tree.map(np.asarray, theirs), advance(state, 14))


@pytest.mark.parametrize("alpha", [7.0, -1.0, float("nan")])
def test_a_first_alpha_outside_its_range_is_refused(alpha):
    loading = transition(init_seeds(1, 1), WHERE, SeedLifecycleState.LOADING, step=0, slot=0).state
    after, refused = transition(loading, WHERE, SeedLifecycleState.ACTIVE, step=1, alpha=alpha)
    assert refused.all()
    assert_bitwise(after, loading)

"""Seeds that incubate: what ends it, what forbids it, and how their failures count."""

from typing import Any

import jax
import numpy as np
import pytest

from esper_functional import (
    Event,
    EventKind,
    SeedLifecycleState,
    absorb,
    apply_event,
    count_faults,
    execute,
    fold_events,
    forward,
    forward_batch,
    forward_dynamic,
    gather,
    incubate,
    init_statistics,
    measure_health,
    observe_statistics,
    plan,
    record_faults,
    reweigh,
    set_alpha,
    shadow_dynamic,
    shadow_forward,
    shadow_forward_batch,
    start_ramp,
    state_digest,
)
from tests.functional.lives import KERNELS, bank, planned, state_of
from tests.functional.networks import SITES, batch, host_params, mlp
from tests.tolerance import assert_bitwise, assert_close

S, K = SeedLifecycleState, EventKind
PARAMS, X, BANK = host_params(), batch(), bank()
ONE = state_of((0, 0, "incubating", 0))
BESIDE = state_of((0, 0, "incubating", 0), (0, 1, "active", 1), (1, 0, "active", 4))
WHERE = np.array([[True, False], [False, False]])


def test_its_faults_are_counted_and_lead_to_recovery():
    state = state_of((0, 0, "incubating", 3), (0, 1, "active", 1))
    own, live = planned(state)

    @jax.jit
    def step(live):
        seen = forward(mlp, own, PARAMS, live, X)[1].faults
        shadows = shadow_forward(mlp, own, PARAMS, live, X)[1].faults
        return count_faults(live, seen, shadows)

    counts = []
    for _ in range(4):
        live = step(live)
        counts.append(live.errors.tolist())
    assert counts == [[1, 0], [2, 0], [3, 0], [3, 0]]
    after = absorb(state, live, step=5)
    assert S(after.stage[0, 0]) is S.ERROR_RECOVERY
    assert after.fallback[0, 0]
    assert not after.incubating.any()
    assert plan(after, KERNELS, SITES).incubating == ()


def test_a_finite_shadow_starts_the_count_anew():
    state = state_of((0, 0, "incubating, failed twice", 0))
    own, live = planned(state)
    seen, shadow = forward(mlp, own, PARAMS, live, X)[1], shadow_forward(mlp, own, PARAMS, live, X)
    counted: Any = count_faults(live, seen.faults, shadow[1].faults)
    assert counted.errors.tolist() == [0]


def test_dynamic_faults_of_shadows_lead_to_recovery_too():
    state = state_of((0, 0, "incubating", 3), (0, 1, "active", 1))

    @jax.jit
    def step(state, now):
        _, seen = forward_dynamic(mlp, PARAMS, state, BANK, X, sites=SITES)
        _, shadow = shadow_dynamic(mlp, PARAMS, state, BANK, X, (0, 0), sites=SITES)
        return record_faults(state, seen, shadow, step=now)

    for now in range(3):
        assert state.error_count.tolist() == [[now, 0], [0, 0]]
        state = step(state, np.int32(now))
    assert S(int(state.stage[0, 0])) is S.ERROR_RECOVERY
    assert not state.incubating.any()


def test_a_step_without_shadows_leaves_the_count_of_what_incubates():
    state = state_of((0, 0, "incubating, failed twice", 3), (0, 1, "failed twice", 1))
    after = execute(mlp, PARAMS, state, KERNELS, X, sites=SITES)[1]
    assert after.error_count[0].tolist() == [2, 0]

    @jax.jit
    def dynamic(state):
        return execute(mlp, PARAMS, state, BANK, X, sites=SITES)[1]

    assert state_digest(jax.tree.map(np.asarray, dynamic(state))) == state_digest(after)
    own, live = planned(state)
    seen = forward_batch(mlp, own, PARAMS, live, X)[1].faults
    assert [fault is None for fault in seen] == [True, False]
    assert count_faults(live, seen).errors.tolist() == [2, 0]
    _, shadow = shadow_forward_batch(mlp, own, PARAMS, live, X)
    assert [fault is None for fault in shadow.faults] == [False, True]
    assert count_faults(live, shadow.faults).errors.tolist() == [3, 2]


def test_a_plan_says_what_incubates_and_weights_follow_other_alphas():
    waiting = state_of((0, 0, "active at 0", 0), (0, 1, "active", 1), (1, 0, "active", 4))
    own, live = planned(BESIDE)
    assert own != planned(waiting)[0]
    assert [run.incubating for run in own.runs] == [True, False, False]
    (shadow,) = live.shadows
    assert_close(shadow.weights, np.array([1 / 1.6, 0.6 / 1.6, 0.6], np.float32))
    assert_close(shadow.host_weights, np.array([0.0, 0.4], np.float32))
    moved = apply_event(BESIDE, Event(9, 0, 1, K.ALPHA, value=0.2))
    again: Any = reweigh(live, moved, own)
    assert_bitwise(again, gather(moved, KERNELS, own))
    assert_bitwise(again.params, live.params)
    assert np.abs(again.shadows[0].weights - shadow.weights).max() > 0.1


@pytest.mark.parametrize("ending", ["alpha", "alpha of 0", "ramp"])
def test_setting_alpha_or_starting_a_ramp_ends_it(ending):
    outcome = {
        "alpha": lambda: set_alpha(ONE, WHERE, 0.3, step=9),
        "alpha of 0": lambda: set_alpha(ONE, WHERE, 0.0, step=9),
        "ramp": lambda: start_ramp(ONE, WHERE, 1.0, 5, step=9),
    }[ending]()
    assert not outcome.refused.any()
    assert not outcome.state.incubating.any()
    refused = (set_alpha(ONE, WHERE, 2.0, step=9), start_ramp(ONE, WHERE, 2.0, 5, step=9))
    for kept in refused:
        assert_bitwise(kept.state, ONE)


def test_off_alpha_zero_it_is_refused():
    stories = ("active", "ramping", "dormant", "loading", "fallback", "fossil", "folded fossil")
    for story in stories:
        state = state_of((0, 0, story, 0))
        outcome = incubate(state, WHERE, step=9)
        assert outcome.refused.tolist() == WHERE.tolist(), story
        assert_bitwise(outcome.state, state)


def test_it_may_be_asked_for_twice_and_after_a_ramp_down_to_zero():
    twice = incubate(ONE, WHERE, step=9)
    assert not twice.refused.any()
    assert state_digest(twice.state.replace(last_update=ONE.last_update)) == state_digest(ONE)
    back = fold_events(
        state_of((0, 0, "active", 0)),
        [Event(10, 0, 0, K.RAMP, value=0.0, span=3), Event(13, 0, 0, K.INCUBATE)],
    )
    assert back.incubating[0, 0]


def test_its_health_is_that_of_its_shadow():
    own, live = planned(BESIDE)
    _, seen = forward(mlp, own, PARAMS, live, X, capture=True)
    _, shadow = shadow_forward(mlp, own, PARAMS, live, X, capture=True)
    assert [output is None for output in seen.outputs] == [True, False, False]
    assert [output is None for output in shadow.outputs] == [False, True, True]
    blended = apply_event(BESIDE, Event(9, 0, 0, K.ALPHA, value=0.5))
    whole, live = planned(blended)
    _, told = forward(mlp, whole, PARAMS, live, X, capture=True)
    assert_close(shadow.outputs[0], told.outputs[0])
    state, _ = observe_statistics(
        BESIDE, init_statistics(2, 2), measure_health(seen.outputs), step=9
    )
    assert np.isnan(state.health[0, 0])
    state, _ = observe_statistics(
        state, init_statistics(2, 2), measure_health(shadow.outputs), step=9
    )
    assert not np.isnan(state.health[[0, 0, 1], [0, 1, 0]]).any()

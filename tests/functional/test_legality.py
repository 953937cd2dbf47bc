"""Who may do what: every stage with every target and every kind of event, on both backends.

The tables are written out from the design and read from nothing under test.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    NO_SLOT,
    Event,
    EventKind,
    Outcome,
    SeedLifecycleError,
    SeedLifecycleState,
    SeedState,
    apply_event,
    incubate,
    init_seeds,
    observe_health,
    observe_latency,
    record_errors,
    release,
    set_alpha,
    start_ramp,
    transition,
)
from tests.tolerance import assert_bitwise

S, K = SeedLifecycleState, EventKind

MAY_ENTER = {
    S.DORMANT: {S.LOADING, S.ACTIVE, S.ERROR_RECOVERY},
    S.LOADING: {S.DORMANT, S.ERROR_RECOVERY},
    S.ACTIVE: {S.LOADING},
    S.ERROR_RECOVERY: {S.LOADING, S.ACTIVE},
    S.FOSSILIZED: {S.ACTIVE},
}
"""For each target the stages from which it may be entered."""

MAY_HAPPEN = {
    K.LOAD: {S.DORMANT, S.ERROR_RECOVERY},
    K.ACTIVATE: {S.LOADING},
    K.CANCEL: {S.LOADING},
    K.FAIL: {S.LOADING},
    K.UNLOAD: {S.ACTIVE},
    K.FOSSILIZE: {S.ACTIVE},
    K.RESET: {S.ERROR_RECOVERY},
    K.ALPHA: {S.ACTIVE},
    K.RAMP: {S.ACTIVE},
    K.INCUBATE: {S.ACTIVE},
    K.FOLD: {S.ACTIVE, S.FOSSILIZED},
    K.ERRORS: {S.ACTIVE, S.FOSSILIZED},
    K.HEALTH: {S.ACTIVE, S.FOSSILIZED},
    K.LATENCY: {S.ACTIVE, S.FOSSILIZED},
    K.UNCALLED: {S.ACTIVE, S.FOSSILIZED},
}
"""For each kind of event the stages in which it is not refused."""

AFTERWARDS = {
    K.LOAD: S.LOADING,
    K.ACTIVATE: S.ACTIVE,
    K.CANCEL: S.DORMANT,
    K.FAIL: S.ERROR_RECOVERY,
    K.UNLOAD: S.DORMANT,
    K.FOSSILIZE: S.FOSSILIZED,
    K.RESET: S.DORMANT,
}
"""The stage after an event that moves; all others leave it, but for those below."""

# Three failures end an ACTIVE seed, and folding one empties it.
ALSO_MOVES = {(K.ERRORS, S.ACTIVE): S.ERROR_RECOVERY, (K.FOLD, S.ACTIVE): S.DORMANT}

VALUE = {K.ERRORS: 3.0, K.LOAD: 2.0, K.HEALTH: 0.5, K.ACTIVATE: 0.25, K.ALPHA: 0.5, K.RAMP: 1.0}
VALUE |= {K.LATENCY: 100.0}


def at_every_stage() -> SeedState:
    """One layer whose seeds are in stage 0 to 4, each with a kernel, at alpha 0."""
    state = init_seeds(1, len(S))
    return state.replace(
        stage=np.arange(len(S), dtype=np.uint8)[None],
        slot=np.array([[NO_SLOT, 1, 1, 1, 1]], np.int32),
    )


EVERY = np.ones((1, len(S)), np.bool_)

FUNCTIONS = {
    K.LOAD: lambda s, w: transition(s, w, S.LOADING, step=9, slot=2),
    K.ACTIVATE: lambda s, w: transition(s, w, S.ACTIVE, step=9, alpha=0.25),
    K.CANCEL: lambda s, w: transition(s, w, S.DORMANT, step=9),
    K.FAIL: lambda s, w: transition(s, w, S.ERROR_RECOVERY, step=9),
    K.UNLOAD: lambda s, w: transition(s, w, S.DORMANT, step=9),
    K.FOSSILIZE: lambda s, w: transition(s, w, S.FOSSILIZED, step=9),
    K.RESET: lambda s, w: transition(s, w, S.DORMANT, step=9),
    K.ALPHA: lambda s, w: set_alpha(s, w, 0.5, step=9),
    K.RAMP: lambda s, w: start_ramp(s, w, 1.0, 4, step=9),
    K.INCUBATE: lambda s, w: incubate(s, w, step=9),
    K.FOLD: lambda s, w: release(s, w, step=9),
    K.ERRORS: lambda s, w: record_errors(s, w, 3, step=9),
    K.HEALTH: lambda s, w: observe_health(s, w, 0.5, step=9),
    K.LATENCY: lambda s, w: observe_latency(s, w, 100.0),
    K.UNCALLED: lambda s, w: s,
}
"""What does the work of each kind; of FOLD, the fossils' part."""


def test_the_tables_are_complete():
    assert set(MAY_ENTER) == set(S)
    assert set(MAY_HAPPEN) == set(FUNCTIONS) == set(K)
    assert {K.LOAD, K.ACTIVATE, K.CANCEL, K.FAIL, K.UNLOAD, K.FOSSILIZE, K.RESET} == set(AFTERWARDS)


@pytest.mark.parametrize("backend", ["numpy", "jitted jax"])
@pytest.mark.parametrize(("stage", "target"), list(itertools.product(S, S)))
def test_every_stage_and_target(stage, target, backend):
    state = at_every_stage()
    only = np.arange(len(S))[None] == int(stage)

    def move(state, where):
        return transition(state, where, target, step=9, slot=2, alpha=0.25)

    if backend == "numpy":
        after, refused = move(state, only)
    else:
        after, refused = jax.jit(move)(jax.tree.map(jnp.asarray, state), only)
    if stage in MAY_ENTER[target]:
        assert S(int(after.stage[0, stage])) is target
        assert not np.asarray(refused).any()
    else:
        assert_bitwise(jax.tree.map(np.asarray, after), state)
        assert np.asarray(refused).tolist() == only.tolist()


@pytest.mark.parametrize(("kind", "stage"), list(itertools.product(K, S)))
def test_every_stage_and_kind_of_event(kind, stage):
    state = at_every_stage()
    event = Event(9, 0, int(stage), kind, value=VALUE.get(kind, 0.0), span=4)
    if stage not in MAY_HAPPEN[kind]:
        with pytest.raises(
            SeedLifecycleError, match=f"seed {int(stage)} of layer 0 is {stage.name} and cannot"
        ):
            apply_event(state, event)
        return
    after = apply_event(state, event)
    expected = ALSO_MOVES.get((kind, stage), AFTERWARDS.get(kind, stage))
    assert S(after.stage[0, stage]) is expected
    others = np.arange(len(S)) != int(stage)
    assert_bitwise(
        jax.tree.map(lambda a: a[:, others], after), jax.tree.map(lambda a: a[:, others], state)
    )


@pytest.mark.parametrize("kind", K)
def test_what_does_the_work_of_each_kind_agrees_on_jitted_jax(kind):
    """All stages at once: refused exactly where the table says, and equal to numpy."""
    state = at_every_stage()
    ours = FUNCTIONS[kind](state, EVERY)
    theirs = jax.jit(FUNCTIONS[kind])(jax.tree.map(jnp.asarray, state), EVERY)
    assert_bitwise(jax.tree.map(np.asarray, theirs), ours)
    if not isinstance(ours, Outcome):
        # These pass over what does not run.
        fields = ("error_count", "last_update", "latency")
        pairs = [(getattr(ours, name), getattr(state, name)) for name in fields]
        same = [(now == before) | (np.isnan(now) & np.isnan(before)) for now, before in pairs]
        changed = ~np.all(same, axis=0)[0]
        expected = set() if kind is K.UNCALLED else MAY_HAPPEN[kind]
        assert {stage for stage in S if changed[stage]} == expected
        return
    allowed = {stage for stage in S if not ours.refused[0, stage]}
    if kind in AFTERWARDS:
        assert allowed == MAY_ENTER[AFTERWARDS[kind]] >= MAY_HAPPEN[kind]
    else:
        assert allowed == MAY_HAPPEN[kind] - ({S.ACTIVE} if kind is K.FOLD else set())


def test_a_fossil_is_released_once():
    state = at_every_stage()
    once = release(state, EVERY, step=9)
    again = release(once.state, EVERY, step=10)
    assert again.refused.all()
    assert_bitwise(again.state, once.state)
    assert once.state.slot[0].tolist() == [NO_SLOT, 1, 1, 1, NO_SLOT]

"""The lifecycle table: the full product of stages, on both backends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    LEGAL,
    MOVES,
    NO_SLOT,
    SeedLifecycleState,
    SeedState,
    init_seeds,
    legal_moves,
    lifecycle_diagram,
    transition,
)
from tests.tolerance import assert_bitwise

S = SeedLifecycleState

# Written out from the design, not read from the table under test.
ALLOWED = {
    (S.DORMANT, S.LOADING),
    (S.LOADING, S.ACTIVE),
    (S.LOADING, S.DORMANT),
    (S.LOADING, S.ERROR_RECOVERY),
    (S.ACTIVE, S.DORMANT),
    (S.ACTIVE, S.ERROR_RECOVERY),
    (S.ACTIVE, S.FOSSILIZED),
    (S.ERROR_RECOVERY, S.DORMANT),
    (S.ERROR_RECOVERY, S.LOADING),
}
PRODUCT = list(itertools.product(S, S))


def worn_state(stage: SeedLifecycleState, shape: tuple[int, ...] = (1, 2)) -> SeedState:
    """A state in which every field differs from its initial value."""
    state = init_seeds(*shape)
    worn = {
        name: np.full_like(getattr(state, name), value)
        for name, value in {
            "stage": int(stage),
            "slot": 7,
            "kernel_id": 11,
            "alpha": 0.25,
            "ramp_from": 0.125,
            "ramp_to": 0.75,
            "ramp_start": 3,
            "ramp_span": 9,
            "ramp_shape": 1,
            "health": 0.5,
            "latency": 12.0,
            "last_update": 4,
            "error_count": 2,
            "fallback": True,
            "incubating": True,
        }.items()
    }
    return SeedState(**worn)


def move(state: SeedState, target: SeedLifecycleState, seed: int = 0):
    where = np.zeros(state.shape, np.bool_)
    where[0, seed] = True
    return transition(state, where, target, step=20, slot=3, kernel_id=(5, -6), alpha=0.5)


def to_jax(state: SeedState) -> SeedState:
    return jax.tree.map(jnp.asarray, state)


@pytest.mark.parametrize(("source", "target"), PRODUCT)
def test_legal_moves_move_and_others_leave_every_array_bitwise_unchanged(source, target):
    state = worn_state(source)
    after, refused = move(state, target)
    if (source, target) in ALLOWED:
        assert after.stage.tolist() == [[target, source]]
        assert after.last_update.tolist() == [[20, 4]]
        assert not refused.any()
    else:
        assert_bitwise(after, state)
        assert refused.tolist() == [[True, False]]
    # The neighbour that was not asked for keeps every array.
    assert_bitwise(jax.tree.map(lambda a: a[:, 1], after), jax.tree.map(lambda a: a[:, 1], state))


@pytest.mark.parametrize("target", S)
def test_every_source_at_once_on_jax_equals_numpy(target):
    state = worn_state(S.DORMANT, (1, len(S)))
    state = state.replace(stage=np.arange(len(S), dtype=np.uint8)[None])
    where = np.ones(state.shape, np.bool_)
    keywords = {"step": 20, "slot": 3, "kernel_id": (5, -6), "alpha": 0.5}
    ours = transition(state, where, target, **keywords)
    theirs = jax.jit(lambda s, w: transition(s, w, target, **keywords))(to_jax(state), where)
    assert_bitwise(theirs, ours)
    assert ours.refused.tolist() == [[(source, target) not in ALLOWED for source in S]]


def test_the_table_is_the_designs_and_is_immutable():
    assert {(m.source, m.target) for m in MOVES} == ALLOWED
    assert {(S(i), S(j)) for i, j in np.argwhere(LEGAL)} == ALLOWED
    with pytest.raises(ValueError, match="read-only"):
        LEGAL[0, 0] = True


@pytest.mark.parametrize("stage", S)
def test_legal_moves_lists_the_row(stage):
    assert set(legal_moves(stage)) == {target for source, target in ALLOWED if source == stage}


def test_stages_are_the_designs_numbers():
    assert [(s.name, s.value) for s in S] == [
        ("DORMANT", 0),
        ("LOADING", 1),
        ("ACTIVE", 2),
        ("ERROR_RECOVERY", 3),
        ("FOSSILIZED", 4),
    ]


def test_the_diagram_has_one_line_for_each_row_and_no_other_arrow():
    arrows = [line.strip() for line in lifecycle_diagram().splitlines() if "-->" in line]
    assert arrows[0] == "[*] --> DORMANT"
    assert arrows[-1] == "FOSSILIZED --> [*]"
    assert arrows[1:-1] == [f"{m.source.name} --> {m.target.name}: {m.cause}" for m in MOVES]


def test_entering_loading_notes_the_kernel_and_forgets_the_last_one():
    after = move(worn_state(S.ERROR_RECOVERY), S.LOADING).state
    assert after.slot[0, 0] == 3
    assert after.kernel_id[0, 0].tolist() == [5, -6]
    assert (after.alpha[0, 0], after.error_count[0, 0], after.fallback[0, 0]) == (0.0, 0, False)
    assert np.isnan(after.health[0, 0])
    assert np.isnan(after.latency[0, 0])
    assert not after.incubating[0, 0]


def test_entering_active_sets_alpha_and_clears_errors_and_fallback():
    before = worn_state(S.LOADING)
    after = move(before, S.ACTIVE).state
    assert (after.alpha[0, 0], after.error_count[0, 0], after.fallback[0, 0]) == (0.5, 0, False)
    assert after.slot[0, 0] == before.slot[0, 0]
    assert_bitwise(after.kernel_id, before.kernel_id)
    assert not after.incubating[0, 0]


@pytest.mark.parametrize("source", [s for s, target in ALLOWED if target is S.DORMANT])
def test_entering_dormant_clears_everything_but_the_last_update(source):
    after = move(worn_state(source), S.DORMANT).state
    fresh = init_seeds(1, 2)
    fresh = fresh.replace(last_update=np.full((1, 2), 20, np.int32))
    assert_bitwise(jax.tree.map(lambda a: a[:, 0], after), jax.tree.map(lambda a: a[:, 0], fresh))
    assert after.slot[0, 0] == NO_SLOT


def test_entering_fossilized_freezes_alpha_where_its_ramp_stands():
    before = worn_state(S.ACTIVE)
    after = move(before, S.FOSSILIZED).state
    assert (after.ramp_span[0, 0], after.ramp_start[0, 0]) == (0, 0)
    assert not after.incubating[0, 0]
    for name in ("alpha", "slot", "kernel_id", "health", "latency", "error_count"):
        assert_bitwise(getattr(after, name), getattr(before, name))


def test_entering_error_recovery_keeps_the_kernel_and_ends_the_ramp():
    before = worn_state(S.ACTIVE)
    after = move(before, S.ERROR_RECOVERY).state
    assert after.ramp_span[0, 0] == 0
    assert not after.incubating[0, 0]
    for name in ("alpha", "slot", "kernel_id", "health"):
        assert_bitwise(getattr(after, name), getattr(before, name))

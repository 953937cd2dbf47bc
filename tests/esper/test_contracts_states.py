"""The states of blueprints and kernels: the tables, in full."""

import itertools

import pytest

from esper.contracts import (
    BLUEPRINT_MOVES,
    CURRENT_KERNELS,
    KERNEL_MOVES,
    BlueprintState,
    KernelState,
    check_move,
    moves_from,
)
from esper.errors import IllegalTransitionError

LEGAL = {
    BlueprintState: {
        ("unvalidated", "compiling"), ("unvalidated", "invalid"),
        ("compiling", "validated"), ("compiling", "invalid"), ("compiling", "unvalidated"),
        ("validated", "unvalidated"), ("invalid", "unvalidated"),
    },
    KernelState: {
        ("testing", "validated"), ("testing", "invalid"),
        ("validated", "deployed"), ("validated", "deprecated"), ("validated", "invalid"),
        ("deployed", "validated"), ("deployed", "deprecated"), ("deployed", "invalid"),
        ("deprecated", "validated"), ("deprecated", "invalid"),
    },
}  # fmt: skip

PAIRS = [pair for kind in LEGAL for pair in itertools.product(kind, kind)]


@pytest.mark.parametrize(("state", "to"), PAIRS)
def test_every_pair_is_legal_or_refused_with_what_is_legal(state, to):
    if (state.value, to.value) in LEGAL[type(state)]:
        check_move("the kernel 3f2a", state, to)
        assert to in moves_from(state)
        return
    assert to not in moves_from(state)
    with pytest.raises(IllegalTransitionError) as raised:
        check_move("the kernel 3f2a", state, to)
    told = str(raised.value)
    assert f"the kernel 3f2a is {state} and cannot become {to}" in told
    for move in type(state):
        named = move.value in told.partition(": ")[2].replace(",", " ").split()
        assert named == ((state.value, move.value) in LEGAL[type(state)])


def test_a_state_without_moves_says_so():
    with pytest.raises(IllegalTransitionError, match="nothing follows that state"):
        check_move("x", KernelState.INVALID, KernelState.TESTING)


@pytest.mark.parametrize("state", BlueprintState)
@pytest.mark.parametrize("to", KernelState)
def test_no_blueprint_becomes_a_state_of_kernels(state, to):
    # Some of both are the same text.
    with pytest.raises(IllegalTransitionError, match=f"{state} and cannot become {to}"):
        check_move("x", state, to)


def test_the_tables_are_complete_and_every_state_is_reached():
    for kind, moves in ((BlueprintState, BLUEPRINT_MOVES), (KernelState, KERNEL_MOVES)):
        assert set(moves) == set(kind)
        seen, first = {next(iter(kind))}, [next(iter(kind))]
        while first:
            fresh = [to for to in moves[first.pop()] if to not in seen]
            seen.update(fresh)
            first.extend(fresh)
        assert seen == set(kind)


def test_searches_leave_out_what_is_not_to_be_used():
    assert set(KernelState) - set(CURRENT_KERNELS) == {
        KernelState.DEPRECATED,
        KernelState.INVALID,
    }

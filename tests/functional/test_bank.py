"""Banks: kernels by slot as data, and what the dynamic mode does with slots that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import (
    NO_PROGRAM,
    NO_SLOT,
    Bank,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleState,
    bank_kernels,
    bare,
    execute,
    init_seeds,
    kernel_from_function,
    make_bank,
    plan,
    put_kernel,
)
from tests.functional.lives import KERNELS, low_rank_kernel, state_of
from tests.functional.networks import (
    SITES,
    batch,
    compilations,
    dense,
    dense_kernel,
    host_params,
    mlp,
)
from tests.tolerance import assert_bitwise, assert_close

S = SeedLifecycleState
PARAMS, X = host_params(), batch()


def executed(state, bank, step=9):
    return execute(mlp, PARAMS, state, bank, X, sites=SITES, step=step)


dynamic = jax.jit(executed)
slots = st.lists(st.integers(0, 9), unique=True, max_size=len(KERNELS))


@settings(max_examples=20)
@given(slots, st.integers(0, 3))
def test_what_is_put_in_comes_out(chosen, spare):
    table = {slot: KERNELS[i] for i, slot in enumerate(chosen)}
    size = max(chosen, default=-1) + 1 + spare
    bank = make_bank(table, slots=size)
    found = bank_kernels(bank)
    assert {slot: kernel.program for slot, kernel in found.items()} == {
        slot: kernel.program for slot, kernel in table.items()
    }
    for slot, kernel in table.items():
        assert_bitwise(found[slot].params, kernel.params)
    code = np.asarray(bank.code)
    assert code.shape == (size,)
    assert [slot for slot in range(size) if code[slot] == NO_PROGRAM] == [
        slot for slot in range(size) if slot not in table
    ]


def test_a_sequence_is_a_table_and_the_highest_slot_counts():
    listed = make_bank([KERNELS[0], KERNELS[1]])
    assert_bitwise(listed, make_bank({0: KERNELS[0], 1: KERNELS[1]}))
    assert make_bank({4: KERNELS[0]}).code.tolist() == [NO_PROGRAM] * 4 + [0]


def test_one_program_with_two_shapes_has_a_place_for_each():
    bank = make_bank([dense_kernel(0), dense_kernel(1, "out"), dense_kernel(2)])
    assert [program.apply for program in bank.programs] == [dense, dense]
    assert bank.code.tolist() == [0, 1, 0]
    assert [jax.tree.leaves(rows)[-1].shape for rows in bank.params] == [(3, 3, 4), (3, 4, 2)]


def test_it_is_a_pytree_whose_programs_are_structure():
    bank = make_bank(KERNELS)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, bank)
    assert isinstance(doubled, Bank)
    assert doubled.programs == bank.programs
    assert_bitwise(jax.jit(lambda b: b)(bank), bank)


def test_put_takes_a_traced_slot_and_replaces_what_was_there():
    bank = make_bank({0: low_rank_kernel(0)}, slots=3, also=[dense_kernel(0)])
    put = jax.jit(lambda bank, slot, params: put_kernel(bank, slot, _dense(params)))
    new = dense_kernel(7)
    with compilations() as count:
        later = put(bank, np.int32(2), new.params)
        assert count() == 1
        later = put(later, np.int32(0), new.params)
        assert count() == 1
    assert bank_kernels(bank).keys() == {0}
    found = bank_kernels(later)
    assert found.keys() == {0, 2}
    for slot in (0, 2):
        assert found[slot].program == new.program
        assert_bitwise(found[slot].params, new.params)
    assert_bitwise(put_kernel(bank, 2, new).params, put(bank, np.int32(2), new.params).params)


def _dense(params):
    return kernel_from_function(dense, params)


def test_put_changes_what_runs_without_a_compilation():
    state = state_of((0, 0, "active at 1", 1), (1, 0, "active at 1", 4))
    bank = make_bank(KERNELS)
    dynamic(state, bank)
    other = put_kernel(bank, 1, dense_kernel(9))
    with compilations() as count:
        y, _ = dynamic(state, other)
        assert count() == 0
    table = {**KERNELS, 1: dense_kernel(9)}
    assert_close(y, execute(mlp, PARAMS, state, table, X, sites=SITES)[0])


@pytest.mark.parametrize(
    "kernel",
    [
        kernel_from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 4))}),
        kernel_from_function(dense, {"w": jnp.ones((3, 3)), "b": jnp.ones(3)}),
        kernel_from_function(dense, {"w": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones(4)}),
        kernel_from_function(dense, {"w": jnp.ones((3, 4))}),
    ],
    ids=["program", "shape", "dtype", "structure"],
)
def test_a_kernel_that_the_bank_does_not_know_is_refused_by_name(kernel):
    with pytest.raises(
        KernelMismatchError, match=r"put_kernel: the bank does not know program.*make_bank's `also`"
    ) as caught:
        put_kernel(make_bank(KERNELS), 0, kernel)
    assert kernel.program.key in str(caught.value)
    assert "float32[3, 4]" in str(caught.value)


@pytest.mark.parametrize("slot", [-1, 2, 7])
def test_make_bank_refuses_slots_outside(slot):
    with pytest.raises(SeedIndexError, match=rf"slots \[{slot}\] are not among the 2 there are"):
        make_bank({slot: KERNELS[0]}, slots=2)


@pytest.mark.parametrize("slot", [-1, 7, 99])
def test_put_refuses_slots_outside(slot):
    bank = make_bank(KERNELS)
    with pytest.raises(SeedIndexError, match=rf"put_kernel: slot {slot} is not among the 7"):
        put_kernel(bank, slot, KERNELS[0])
    # There is nobody to tell inside a program.
    traced = jax.jit(lambda slot: put_kernel(bank, slot, dense_kernel(9)))
    assert_bitwise(traced(np.int32(slot)), bank)


EMPTY = {
    "no slots": make_bank({}),
    "no programs": make_bank({}, slots=8),
    "no kernels": make_bank({}, slots=8, also=list(KERNELS.values())),
    "programs without slots": make_bank({}, slots=0, also=list(KERNELS.values())),
}


@pytest.mark.parametrize("name", EMPTY)
def test_with_an_empty_bank_the_host_runs_and_every_running_seed_fails(name):
    plain = jax.jit(lambda p, x: mlp(p, bare, x))(PARAMS, X)
    y, after = dynamic(init_seeds(2, 2), EMPTY[name])
    assert_bitwise(y, plain)
    assert not np.asarray(after.error_count).any()
    y, after = dynamic(state_of((0, 1, "active", 0), (1, 0, "failed twice", 4)), EMPTY[name])
    assert_close(y, plain)
    assert after.error_count.tolist() == [[0, 1], [3, 0]]
    assert S(int(after.stage[1, 0])) is S.ERROR_RECOVERY
    assert bank_kernels(EMPTY[name]) == {}


# Slot 4 holds a kernel of the other site, 7 and above lie outside, the last fits.
MISPLACED = {"other site": 4, "outside": 7, "far outside": 2**31 - 1, "none": NO_SLOT}


@pytest.mark.parametrize("where", MISPLACED)
def test_a_kernel_that_does_not_fit_its_site_counts_failures_and_falls_back(where):
    table = {**{i: KERNELS[i] for i in range(6)}, 6: dense_kernel(6)}
    bank = make_bank(table)
    state = state_of((0, 0, "active", 0), (0, 1, "active", 1), (1, 0, "active", 5))
    slot = np.where(state.slot == 0, MISPLACED[where], state.slot).astype(np.int32)
    lost = state.replace(slot=slot)
    counts, y = [], None
    without = dynamic(state_of((0, 1, "active", 1), (1, 0, "active", 5)), bank)[0]
    for step in range(4):
        y, lost = dynamic(lost, bank, np.int32(step))
        counts.append(lost.error_count.tolist())
    assert counts == [[[n, 0], [0, 0]] for n in (1, 2, 3, 3)]
    assert S(int(lost.stage[0, 0])) is S.ERROR_RECOVERY
    assert bool(lost.fallback[0, 0])
    assert_close(y, without)


def test_the_planned_mode_refuses_what_the_dynamic_one_counts():
    """On the host there is somebody to tell."""
    state = state_of((0, 0, "active", 4))
    with pytest.raises(KernelMismatchError, match="does not fit site 'hidden'"):
        executed(state, KERNELS)
    outside = state.replace(slot=np.where(state.slot == 4, 9, state.slot).astype(np.int32))
    with pytest.raises(SeedIndexError, match="runs the kernel in slot 9, and no kernel is there"):
        plan(outside, bank_kernels(make_bank(KERNELS)), SITES)


def test_parameters_in_numpy_and_without_any_are_kept():
    def double(params, x):
        return 2.0 * x

    own = make_bank([kernel_from_function(double, {}), _dense({"w": np.ones((3, 4), np.float32)})])
    assert [k.program.apply for k in bank_kernels(own).values()] == [double, dense]
    assert bank_kernels(own)[0].params == {}
    assert dataclasses.asdict(own)["code"].tolist() == [0, 1]

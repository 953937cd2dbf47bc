"""SeedState: its arrays, its immutability, its identity."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_functional import (
    NO_SLOT,
    SeedLifecycleState,
    SeedState,
    init_seeds,
    kernel_id_words,
    running,
    state_digest,
)
from tests.tolerance import assert_bitwise

FIELDS = [field.name for field in dataclasses.fields(SeedState)]
DTYPES = {
    "stage": np.uint8,
    "slot": np.int32,
    "kernel_id": np.int32,
    "alpha": np.float32,
    "ramp_from": np.float32,
    "ramp_to": np.float32,
    "ramp_start": np.int32,
    "ramp_span": np.int32,
    "ramp_shape": np.uint8,
    "health": np.float32,
    "latency": np.float32,
    "last_update": np.int32,
    "error_count": np.int32,
    "fallback": np.bool_,
    "incubating": np.bool_,
}

GOLDEN = "51f57a613ef9687914e04e29074db46e59ffefc1393e842efb4fc6db907d2354"
"""Digest of `init_seeds(2, 3)`: ledgers of old runs hold such digests, so it must not change."""


@pytest.mark.parametrize("axes", [(1, 1), (2, 3), (4, 2, 3), (0, 3)])
def test_every_array_has_its_dtype_and_the_leading_axes(axes):
    state = init_seeds(*axes)
    assert state.shape == axes
    for name, dtype in DTYPES.items():
        array = getattr(state, name)
        assert array.dtype == dtype
        assert array.shape == (axes if name != "kernel_id" else (*axes, 2))
    assert list(DTYPES) == FIELDS


def test_initial_seeds_are_dormant_and_empty():
    state = init_seeds(2, 3)
    assert (state.stage == SeedLifecycleState.DORMANT).all()
    assert (state.slot == NO_SLOT).all()
    assert np.isnan(state.health).all()
    assert np.isnan(state.latency).all()
    for name in set(FIELDS) - {"stage", "slot", "health", "latency"}:
        assert not getattr(state, name).any()
    assert not np.asarray(running(state)).any()


def test_a_seed_takes_52_bytes_which_is_less_than_100():
    state = init_seeds(10, 10)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 52 * 100


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_can_be_assigned_or_deleted(name):
    state = init_seeds(1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
        setattr(state, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
        delattr(state, name)


def test_replace_leaves_the_original_alone():
    state = init_seeds(1, 2)
    before = state_digest(state)
    other = state.replace(alpha=np.ones((1, 2), np.float32))
    assert state_digest(state) == before != state_digest(other)
    assert other.stage is state.stage


def test_it_is_a_pytree_with_its_fields_names_as_paths():
    state = init_seeds(1, 2)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == [f".{name}" for name in FIELDS]
    assert_bitwise(jax.jit(lambda s: s)(state), state)
    # Rebuilt with leaves of any kind, as `eval_shape`, shardings and filters do.
    assert jax.tree.map(lambda _: None, state).stage is None


@pytest.mark.parametrize("stage", SeedLifecycleState)
@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("slot", [NO_SLOT, 0, 5])
def test_what_runs_is_active_or_a_fossil_with_a_slot_and_not_in_fallback(stage, fallback, slot):
    state = init_seeds(1, 1).replace(
        stage=np.full((1, 1), int(stage), np.uint8),
        fallback=np.full((1, 1), fallback),
        slot=np.full((1, 1), slot, np.int32),
    )
    fossil = stage is SeedLifecycleState.FOSSILIZED and slot != NO_SLOT
    at_work = stage is SeedLifecycleState.ACTIVE or fossil
    assert running(state).tolist() == [[at_work and not fallback]]
    assert running(jax.tree.map(jnp.asarray, state)).tolist() == running(state).tolist()


@given(st.binary(min_size=32, max_size=32))
def test_kernel_id_words_are_the_first_63_bits(digest):
    high, low = kernel_id_words(digest.hex())
    # Bit by bit, most significant first.
    bits = "".join(f"{byte:08b}" for byte in digest)[:63]
    assert high == int(bits[:31], 2)
    assert low % 2**32 == int(bits[31:], 2)
    assert np.array([high, low], np.int32).tolist() == [high, low]


def test_an_empty_kernel_id_gives_zeros():
    assert kernel_id_words("") == (0, 0)


@pytest.mark.parametrize("bad", ["abc", "g" * 64, "A" * 64, "0" * 63, "0" * 65, "0x" + "0" * 62])
def test_other_kernel_ids_are_refused_with_what_was_found(bad):
    with pytest.raises(ValueError, match=f"64 lower-case hexadecimal digits.*got '{bad}'"):
        kernel_id_words(bad)


def test_the_digest_of_the_initial_state_is_pinned():
    assert state_digest(init_seeds(2, 3)) == GOLDEN


def test_the_digest_is_the_same_for_numpy_jax_and_non_contiguous_arrays():
    state = init_seeds(2, 3)
    assert state_digest(jax.tree.map(jnp.asarray, state)) == GOLDEN
    doubled = jax.tree.map(lambda a: np.repeat(a, 2, axis=0)[::2], state)
    assert state_digest(doubled) == GOLDEN


def test_the_digest_sees_shapes_and_says_sha256():
    assert len({state_digest(init_seeds(*axes)) for axes in [(2, 3), (3, 2), (6,), (1, 6)]}) == 4
    assert len(state_digest(init_seeds(1, 1))) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("name", FIELDS)
def test_the_digest_changes_with_any_single_element(name):
    state = init_seeds(2, 3)
    size = getattr(state, name).size
    seen = {state_digest(state)}
    for i in range(size):
        array = np.copy(getattr(state, name))
        array.reshape(-1)[i] = 1
        seen.add(state_digest(state.replace(**{name: array})))
    assert len(seen) == size + 1

"""Host layers in bfloat16 and float16: finite, near float32, initialised alike."""

import jax
import jax.numpy as jnp
import pytest

from tests.functional.layers import CASES, jitted, made
from tests.tolerance import assert_bitwise, assert_finite, assert_tree_close

every_half = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


@pytest.mark.parametrize("name", CASES)
@every_half
def test_half_precision_is_finite_and_near_float32(name, dtype):
    case, params, x, cotangent = made(name)
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x, cotangent))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    found = jitted(case.apply, *half)
    assert_finite(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found))
    expected = jitted(case.apply, *wide)
    assert_tree_close(found, jax.tree.map(lambda leaf: leaf.astype(dtype), expected))


@pytest.mark.parametrize("name", ["linear", "conv2d", "attention, masked"])
@every_half
def test_half_precision_parameters_are_those_of_float32_rounded(name, dtype):
    init = CASES[name].init
    key = jax.random.key(4)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), init(key, jnp.float32))
    assert_bitwise(init(key, dtype), rounded)

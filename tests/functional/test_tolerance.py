"""The one table of tolerances, and the comparison that reads it."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_functional import TOLERANCES, difference

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": jnp.bfloat16,
}


@pytest.mark.parametrize("name", TOLERANCES)
def test_every_row_is_wider_than_the_dtypes_own_precision(name):
    epsilon = float(jnp.finfo(DTYPES[name]).eps)
    absolute, relative = TOLERANCES[name]
    assert epsilon < relative < 100_000 * epsilon
    assert 0 < absolute <= relative


def test_narrower_dtypes_have_wider_rows():
    rows = [TOLERANCES[name] for name in ("float64", "float32", "float16", "bfloat16")]
    assert rows == sorted(rows)


@pytest.mark.parametrize("name", TOLERANCES)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8))
def test_an_array_equals_itself(name, values):
    array = np.array(values).astype(DTYPES[name])
    assert difference(array, array) == (0.0, difference(array, array).allowed)
    assert difference(array, array).within


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8),
    st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8),
)
def test_it_is_the_largest_gap_against_the_largest_value(values, shifts):
    b = np.array(values, np.float32)
    a = b + np.array(shifts[: len(values)], np.float32)
    found = difference(a, b)
    assert found.largest == max(abs(float(x) - float(y)) for x, y in zip(a, b, strict=True))
    assert found.allowed == 1e-6 + 1e-5 * max(abs(float(y)) for y in b)
    assert found.within == (found.largest <= found.allowed)


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((2, 1), (2,)), ((), (1,))])
def test_other_shapes_are_refused(shapes):
    a, b = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match="cannot compare shapes") as caught:
        difference(a, b)
    assert all(str(shape) in str(caught.value) for shape in shapes)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_within_nothing(side):
    pair = [np.zeros(3, np.float32), np.zeros(3, np.float32)]
    pair[side][1] = np.nan
    assert not difference(*pair).within


@pytest.mark.parametrize("infinite", [np.inf, -np.inf])
def test_infinities_equal_themselves_and_excuse_nothing_else(infinite):
    a, b = np.ones(3, np.float32), np.ones(3, np.float32)
    b[0] = infinite
    assert not difference(a, b).within
    assert not difference(b, a).within
    a[0] = -infinite
    assert not difference(a, b).within
    a[0] = infinite
    assert difference(a, b).largest == 0
    a[1] = 100
    assert not difference(a, b).within


def test_the_row_is_that_of_the_expected_or_as_asked():
    a, b = np.array([1.0], np.float64), np.array([1.001], np.float16)
    assert difference(a, b).within
    assert not difference(b, a).within
    assert difference(b, a, "bfloat16").within


def test_empty_arrays_are_equal():
    assert difference(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)).within

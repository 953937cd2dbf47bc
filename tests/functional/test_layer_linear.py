"""Linear layers: parity with torch, initial values, refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import KasminaException, LayerShapeError, init_linear, linear
from tests.functional.layers import assert_parity, draw, unhooked
from tests.tolerance import assert_bitwise

sizes = st.integers(1, 6)


@settings(max_examples=15)
@given(
    inputs=sizes,
    outputs=sizes,
    lead=st.lists(st.integers(1, 3), max_size=2),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_output_and_every_gradient_are_torchs(inputs, outputs, lead, bias, seed):
    arrays = {"x": draw(seed, *lead, inputs), "weight": draw(seed, outputs, inputs)}
    if bias:
        arrays["bias"] = draw(seed, outputs)

    def ours(x, **params):
        own: Any = params
        return linear(own, x)

    def theirs(x, weight, bias=None):
        return torch.nn.functional.linear(x, weight, bias)

    assert_parity(ours, theirs, arrays, seed)


@settings(max_examples=20)
@given(inputs=sizes, outputs=sizes, seed=st.integers(0, 1000))
def test_initial_values_are_those_that_recorded_runs_began_with(inputs, outputs, seed):
    key = jax.random.key(seed)
    first, second = jax.random.split(key)
    bound = inputs**-0.5
    expected = {
        "weight": jax.random.uniform(first, (outputs, inputs), jnp.float32, -bound, bound),
        "bias": jax.random.uniform(second, (outputs,), jnp.float32, -bound, bound),
    }
    assert_bitwise(init_linear(key, inputs, outputs), expected)


def test_without_a_bias_there_is_no_entry_and_the_weight_is_the_same():
    key = jax.random.key(0)
    bare = init_linear(key, 4, 3, bias=False)
    assert list(bare) == ["weight"]
    assert_bitwise(bare["weight"], init_linear(key, 4, 3)["weight"])


def test_initial_values_spread_as_torchs():
    ours = init_linear(jax.random.key(0), 64, 500)
    theirs = torch.nn.Linear(64, 500)
    for name, parameter in theirs.named_parameters():
        assert np.abs(ours[name]).max() <= 64**-0.5
        assert np.std(ours[name]) == pytest.approx(parameter.std().item(), rel=0.1)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            jnp.zeros((2, 5)),
            r"linear: expected an input \[\*batch, in\] with 4 features at axis -1",
        ),
        (jnp.zeros((2, 5)), r"got float32\[2, 5\]\. .*build the layer for 5 features"),
        (jnp.zeros(()), r"linear: expected an input \[\*batch, in\]; got float32\[\]"),
        (
            jnp.zeros((2, 4), jnp.bfloat16),
            r"got bfloat16\[2, 4\] for the input and float32.* for '(weight|bias)'.*astype",
        ),
        (np.zeros((2, 4), np.int32), r"got int32\[2, 4\] for the input"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    params = init_linear(jax.random.key(0), 4, 3)
    with unhooked(), pytest.raises(LayerShapeError, match=message):
        linear(params, x)
    with unhooked(), pytest.raises(LayerShapeError, match=message):
        jax.jit(linear)(params, x)


def test_parameters_that_do_not_fit_are_refused():
    x = jnp.zeros((2, 4))
    stacked: Any = {"weight": jnp.zeros((5, 3, 4))}
    with pytest.raises(LayerShapeError, match=r"expected a weight \[out, in\].*vmap"):
        linear(stacked, x)
    wide: Any = {"weight": jnp.zeros((3, 4)), "bias": jnp.zeros((2,))}
    with pytest.raises(LayerShapeError, match=r"expected 'bias' of shape \[3\].*float32\[2\]"):
        linear(wide, x)
    without: Any = {"weight": jnp.zeros((3, 4)), "bias": None}
    with pytest.raises(LayerShapeError, match="an array for 'bias'; got None. Leave the entry out"):
        linear(without, x)
    whole: Any = {"weight": jnp.zeros((3, 4), jnp.int32)}
    with unhooked(), pytest.raises(LayerShapeError, match="a floating dtype.*got int32"):
        linear(whole, jnp.zeros((2, 4), jnp.int32))


@pytest.mark.parametrize("sizes", [(0, 3), (4, -1), (4, 2.0), (True, 3)])
def test_sizes_that_are_none_are_refused(sizes):
    with unhooked(), pytest.raises(LayerShapeError, match="an integer of at least 1; got"):
        init_linear(jax.random.key(0), *sizes)


def test_a_dtype_that_is_not_floating_is_refused():
    with pytest.raises(LayerShapeError, match="init_linear: expected a floating dtype.*int32"):
        init_linear(jax.random.key(0), 4, 3, dtype=jnp.int32)


def test_the_error_is_one_of_espers_and_a_value_error():
    assert issubclass(LayerShapeError, KasminaException)
    assert issubclass(LayerShapeError, ValueError)

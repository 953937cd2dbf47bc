"""Layer normalisation: parity with torch, its laws, refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import LayerShapeError, init_layer_norm, layer_norm
from tests.functional.layers import assert_parity, draw, unhooked
from tests.tolerance import assert_bitwise, assert_close


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    lead=st.lists(st.integers(1, 3), max_size=2),
    shape=st.lists(st.integers(2, 5), min_size=1, max_size=2),
    bias=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-2]),
)
def test_output_and_every_gradient_are_torchs(seed, lead, shape, bias, eps):
    # Of two values, 1 and −1 are all that is left: the gradient is rounding.
    shape = [*shape[:-1], max(shape[-1], 3)]
    arrays = {"x": draw(seed, *lead, *shape), "weight": draw(seed, *shape)}
    if bias:
        arrays["bias"] = draw(seed + 1, *shape)

    def ours(x, **params):
        own: Any = params
        return layer_norm(own, x, eps=eps)

    def theirs(x, weight, bias=None):
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    assert_parity(ours, theirs, arrays, seed)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), shift=st.floats(-10, 10, width=32))
def test_it_is_blind_to_shift_and_scale(seed, shift):
    params = init_layer_norm(6)
    x = jnp.asarray(draw(seed, 3, 6))
    y = layer_norm(params, x, eps=0.0)
    assert_close(jnp.mean(y, axis=-1), jnp.zeros(3))
    assert_close(jnp.mean(jnp.square(y), axis=-1), jnp.ones(3))
    moved = layer_norm(params, 4.0 * x + shift, eps=0.0)
    # A shift costs as many digits as it is larger than what it hides.
    assert jnp.abs(moved - y).max() < 1e-5 * (10 + abs(shift)) / float(jnp.std(x, axis=-1).min())


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_squares_that_half_precision_cannot_hold_do_no_harm(dtype):
    x = jnp.asarray([[30000.0, -30000.0, 20000.0, 0.0]], dtype)
    y = layer_norm(init_layer_norm(4, dtype=dtype), x)
    expected = layer_norm(init_layer_norm(4), x.astype(jnp.float32))
    assert_close(y, expected.astype(dtype))


@pytest.mark.parametrize("shape", [3, (3,), (2, 3)])
def test_it_begins_as_torchs(shape):
    expected = torch.nn.LayerNorm(shape)
    params = init_layer_norm(shape)
    for name, parameter in expected.named_parameters():
        assert_bitwise(params[name], parameter.detach().numpy())
    assert list(init_layer_norm(shape, bias=False)) == ["weight"]
    assert all(
        p.dtype == jnp.bfloat16 for p in jax.tree.leaves(init_layer_norm(shape, dtype=jnp.bfloat16))
    )


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (4,), ()])
def test_inputs_that_do_not_fit_are_refused(shape):
    params = init_layer_norm((3, 5))
    message = r"layer_norm: .*trailing axes are the weight's, \[3, 5\]; got float32\["
    with unhooked(), pytest.raises(LayerShapeError, match=message):
        layer_norm(params, jnp.zeros(shape))
    with unhooked(), pytest.raises(LayerShapeError, match=message):
        jax.jit(layer_norm)(params, jnp.zeros(shape))


def test_parameters_that_do_not_fit_are_refused():
    params = init_layer_norm(4)
    with pytest.raises(LayerShapeError, match=r"layer_norm: .*got float16\[2, 4\] for the input"):
        layer_norm(params, jnp.zeros((2, 4), jnp.float16))
    with pytest.raises(LayerShapeError, match=r"expected 'bias' of shape \[4\].*float32\[3\]"):
        layer_norm({**params, "bias": jnp.zeros(3)}, jnp.zeros((2, 4)))
    with pytest.raises(LayerShapeError, match="layer_norm: expected at least one axis"):
        layer_norm({"weight": jnp.ones(())}, jnp.zeros((2, 4)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"expected at least one axis to normalise; got a shape \[\]"),
        (0, "expected shape to be an integer of at least 1; got 0"),
        ((3, -1), "expected shape to be an integer of at least 1; got -1"),
    ],
)
def test_shapes_that_are_none_are_refused(shape, message):
    with pytest.raises(LayerShapeError, match="init_layer_norm: " + message):
        init_layer_norm(shape)


def test_a_dtype_that_is_not_floating_is_refused():
    with pytest.raises(LayerShapeError, match="init_layer_norm: expected a floating dtype"):
        init_layer_norm(3, dtype=jnp.int32)

"""What attention refuses, and what it says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import LayerShapeError, attention, init_attention
from tests.functional.layers import unhooked

PARAMS = init_attention(jax.random.key(0), 6, 2, key_features=3, value_features=4)
QUERY, KEYS, VALUES = (jnp.zeros((2, *shape)) for shape in ((4, 6), (5, 3), (5, 4)))


def refused(message: str, *inputs: Any, params: Any = PARAMS, num_heads=2, **options: Any):
    with unhooked(), pytest.raises(LayerShapeError, match=message):
        attention(params, *inputs, num_heads=num_heads, **options)


def test_what_fits_passes():
    assert attention(PARAMS, QUERY, KEYS, VALUES, num_heads=2).shape == QUERY.shape


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((QUERY[..., :5], KEYS, VALUES), r"the query of attention: .*6 features.*\[2, 4, 5\]"),
        ((QUERY, KEYS[..., :2], VALUES), r"the keys of attention: .*3 features.*\[2, 5, 2\]"),
        ((QUERY, KEYS), r"the values of attention: .*4 features.*\[2, 5, 3\]"),
        ((QUERY,), r"the keys of attention: .*3 features.*\[2, 4, 6\]"),
        ((QUERY[0, 0], KEYS, VALUES), r"the query of .* \[\*batch, length, features\]; .*\[6\]"),
        ((QUERY[:1], KEYS, VALUES), r"same leading axes.*\[1, 4, 6\], .*\[2, 5, 3\] and"),
        ((QUERY, KEYS, VALUES[:, :4]), r"keys and values of one length.*\[2, 5, 3\] and .*4, 4\]"),
        ((QUERY.astype(jnp.float16), KEYS, VALUES), "float16.*for the input.*for 'keys'"),
        (
            tuple(x.astype(jnp.bfloat16) for x in (QUERY, KEYS, VALUES)),
            r"the query of attention: .*one dtype.*bfloat16\[2, 4, 6\].*astype",
        ),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    refused(message, *inputs)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((4, 5), np.int32), r" of bool \(True may attend\).*int32\[4, 5\].*astype"),
        (np.zeros((4, 5), np.float16), r"or float32 \(added to the logits\); got float16"),
        (np.ones((5, 4), np.bool_), r"here \[2, 2, 4, 5\]; got bool\[5, 4\]"),
        (np.ones((3, 4, 5), np.bool_), r"here \[2, 2, 4, 5\]; got bool\[3, 4, 5\].*for the heads"),
        (np.ones((1, 2, 2, 4, 5), np.bool_), r"got bool\[1, 2, 2, 4, 5\]"),
        (np.zeros((2, 4, 4), np.float32), r"got float32\[2, 4, 4\]"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    refused("attention: expected a mask.*" + message, QUERY, KEYS, VALUES, mask=mask)


def test_dropout_without_a_key():
    refused("expected a dropout_key with dropout 0.1; got none", QUERY, KEYS, VALUES, dropout=0.1)


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_a_dropout_outside_its_range(dropout):
    message = r"attention: expected dropout in \[0, 1\]; got"
    refused(message, QUERY, KEYS, VALUES, dropout=dropout, dropout_key=jax.random.key(0))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (4, "expected num_heads to divide features; 6 is not a multiple of 4.*divisor of 6"),
        (0, "expected num_heads to be an integer of at least 1; got 0"),
    ],
)
def test_heads_that_do_not_divide(heads, message):
    refused("attention: " + message, QUERY, KEYS, VALUES, num_heads=heads)
    with pytest.raises(LayerShapeError, match="init_attention: " + message):
        init_attention(jax.random.key(0), 6, heads)


def test_parameters_that_do_not_fit():
    stacked = {**PARAMS, "key": {"weight": jnp.zeros((3, 6, 3))}}
    message = r"the key projection of attention: expected a weight \[out, in\].*vmap"
    refused(message, QUERY, KEYS, VALUES, params=stacked)
    narrow = {**PARAMS, "key": {"weight": jnp.zeros((4, 3))}}
    message = "equally many features; got {'query': 6, 'key': 4, 'value': 6}"
    refused(message, QUERY, KEYS, VALUES, params=narrow)
    other = {**PARAMS, "out": {"weight": jnp.zeros((6, 8))}}
    message = "the output of attention: .*with 8 features"
    refused(message, QUERY, KEYS, VALUES, params=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_features": 0}, "expected key_features to be an integer of at least 1; got 0"),
        ({"value_features": -2}, "expected value_features to be an integer of at least 1; got -2"),
        ({"dtype": jnp.int32}, "expected a floating dtype.*int32"),
    ],
)
def test_layers_that_cannot_be(options, message):
    with pytest.raises(LayerShapeError, match="init_attention: " + message):
        init_attention(jax.random.key(0), 6, 2, **options)

"""Convolutions: parity with torch in every option, initial values, refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import PADDING_MODES, LayerShapeError, conv2d, init_conv2d
from tests.functional.layers import assert_parity, draw, unhooked
from tests.tolerance import assert_bitwise, assert_close

HEIGHT, WIDTH = 6, 7


def either(low: int, high: int):
    """One number for both axes, or one for each."""
    one = st.integers(low, high)
    return one | st.tuples(one, one)


def torch_conv(arrays, kernel, options):
    """`torch.nn.Conv2d` as a function of input and parameters."""
    groups, outs = options["groups"], arrays["weight"].shape[0]
    ins = arrays["weight"].shape[1] * groups
    module = torch.nn.Conv2d(ins, outs, kernel, bias="bias" in arrays, **options)

    def theirs(x, **params):
        flat = x.reshape(-1, *x.shape[-3:])
        y = torch.func.functional_call(module, params, (flat,))
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    return theirs


def check(seed, lead, ins, outs, kernel, bias, options):
    shape = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    groups = options["groups"]
    arrays = {
        "x": draw(seed, *lead, ins * groups, HEIGHT, WIDTH),
        "weight": draw(seed, outs * groups, ins, *shape),
    }
    if bias:
        arrays["bias"] = draw(seed, outs * groups)

    def ours(x, **params):
        own: Any = params
        return conv2d(own, x, **options)

    assert_parity(ours, torch_conv(arrays, kernel, options), arrays, seed)


@pytest.mark.parametrize("mode", PADDING_MODES)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 1000),
    lead=st.sampled_from([(), (2,), (2, 1)]),
    ins=st.integers(1, 2),
    outs=st.integers(1, 2),
    groups=st.integers(1, 2),
    kernel=either(1, 3),
    bias=st.booleans(),
    stride=either(1, 2),
    padding=either(0, 3) | st.just("valid"),
    dilation=either(1, 2),
)
def test_output_and_every_gradient_are_torchs(
    mode, seed, lead, ins, outs, groups, kernel, bias, stride, padding, dilation
):
    options = {
        "stride": stride,
        "padding": padding,
        "padding_mode": mode,
        "dilation": dilation,
        "groups": groups,
    }
    check(seed, lead, ins, outs, kernel, bias, options)


@pytest.mark.parametrize("mode", PADDING_MODES)
@settings(max_examples=4)
@given(seed=st.integers(0, 1000), kernel=either(1, 4), dilation=either(1, 2))
# Torch warns that it copies the input where "same" adds an odd number.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_same_is_torchs_with_its_odd_row_at_the_end(mode, seed, kernel, dilation):
    options = {"padding": "same", "padding_mode": mode, "dilation": dilation, "groups": 1}
    check(seed, (2,), 2, 2, kernel, True, options)


def test_same_keeps_the_size():
    params = init_conv2d(jax.random.key(0), 1, 1, (4, 3))
    assert conv2d(params, jnp.zeros((1, 5, 6)), padding="same", dilation=2).shape == (1, 5, 6)


def test_a_kernel_of_one_tap_is_a_linear_layer_of_the_channels():
    params: Any = init_conv2d(jax.random.key(0), 3, 2, 1)
    x = jnp.asarray(draw(0, 4, 3, 5, 5))
    rows = jnp.einsum("oc,nchw->nohw", params["weight"][:, :, 0, 0], x)
    assert_close(conv2d(params, x), rows + params["bias"][:, None, None])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [3, (2, 5)])
def test_initial_values_spread_as_torchs(groups, kernel):
    ours: Any = init_conv2d(jax.random.key(0), 16, 64, kernel, groups=groups)
    theirs = torch.nn.Conv2d(16, 64, kernel, groups=groups)
    fan_in = theirs.weight[0].numel()
    for name, parameter in theirs.named_parameters():
        assert ours[name].shape == tuple(parameter.shape)
        assert np.abs(ours[name]).max() <= fan_in**-0.5
        assert np.std(ours[name]) == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.2)
        assert parameter.abs().max().item() <= fan_in**-0.5


def test_without_a_bias_there_is_no_entry_and_the_weight_is_the_same():
    key = jax.random.key(0)
    bare = init_conv2d(key, 2, 3, 3, bias=False)
    assert list(bare) == ["weight"]
    assert_bitwise(bare["weight"], init_conv2d(key, 2, 3, 3)["weight"])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 8, 8), r"with 4 features at axis -3.*got float32\[5, 8, 8\].*for 5 features"),
        ((8, 8), r"expected an input \[\*batch, in, height, width\]; got float32\[8, 8\]"),
        ((2, 4, 2, 8), r"a height of at least 3 for a kernel that spans 3.*\[2, 4, 2, 8\]"),
        ((2, 4, 8, 1), r"a width of at least 2 for a kernel that spans 2.*Pad more"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape, message):
    params = init_conv2d(jax.random.key(0), 4, 6, (3, 2))
    with unhooked(), pytest.raises(LayerShapeError, match="conv2d: .*" + message):
        conv2d(params, jnp.zeros(shape))
    with unhooked(), pytest.raises(LayerShapeError, match="conv2d: .*" + message):
        jax.jit(conv2d)(params, jnp.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_mode": "reflct"}, "unknown padding_mode 'reflct'.*did you mean 'reflect'"),
        ({"padding_mode": "?"}, "expected one of zeros, reflect, replicate, circular$"),
        ({"padding": "sam"}, "unknown padding 'sam': expected one of same, valid.*'same'"),
        ({"padding": -1}, "expected padding to be an integer of at least 0.*got -1"),
        ({"padding": (1, 2, 3)}, r"pair of them for height and width; got \(1, 2, 3\)"),
        ({"padding": "same", "stride": (1, 2)}, r"stride 1 with padding 'same'; got.*\(1, 2\)"),
        ({"stride": 0}, "expected stride to be an integer of at least 1.*got 0"),
        ({"dilation": 1.5}, "expected dilation to be an integer of at least 1.*got 1.5"),
        ({"groups": 4}, "expected groups to divide out_channels; 6 is not a multiple of 4"),
        ({"groups": 0}, "expected groups to be an integer of at least 1; got 0"),
        ({"groups": 2}, "an input .* with 8 features at axis -3"),
        (
            {"padding": (6, 0), "padding_mode": "reflect"},
            "a padding of at most 5 with padding_mode 'reflect' along a height of 6; got 6",
        ),
        (
            {"padding": (0, 8), "padding_mode": "circular"},
            "at most 7 with padding_mode 'circular' along a width of 7; got 8.*'replicate'",
        ),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    params = init_conv2d(jax.random.key(0), 4, 6, 2)
    with unhooked(), pytest.raises(LayerShapeError, match="conv2d: .*" + message):
        conv2d(params, jnp.zeros((1, 4, HEIGHT, WIDTH)), **options)


def test_parameters_that_do_not_fit_are_refused():
    params = init_conv2d(jax.random.key(0), 2, 3, 2)
    x = jnp.zeros((1, 2, 4, 4))
    with pytest.raises(LayerShapeError, match=r"got bfloat16.*for the input and float32"):
        conv2d(params, x.astype(jnp.bfloat16))
    with pytest.raises(LayerShapeError, match=r"expected 'bias' of shape \[3\].*float32\[2\]"):
        conv2d({**params, "bias": jnp.zeros(2)}, x)
    with pytest.raises(LayerShapeError, match=r"a weight \[out, in/groups, height, width\].*vmap"):
        conv2d({"weight": jnp.zeros((5, 3, 2, 2, 2))}, x)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, 4, 3), {"groups": 2}, "expected groups to divide in_channels; 3 is not a multiple"),
        ((4, 3, 3), {"groups": 2}, "expected groups to divide out_channels; 3 .* divisor of 3"),
        ((0, 3, 3), {}, "expected in_channels to be an integer of at least 1; got 0"),
        ((2, 3, (3, 0)), {}, r"expected kernel_size to be an integer of at least 1.*\(3, 0\)"),
        ((2, 3, 3), {"dtype": jnp.int8}, "expected a floating dtype.*got int8"),
    ],
)
def test_layers_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(LayerShapeError, match="init_conv2d: " + message):
        init_conv2d(jax.random.key(0), *arguments, **options)

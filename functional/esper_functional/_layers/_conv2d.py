"""Two-dimensional convolutions."""

from typing import Any, Literal, NotRequired, TypedDict, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from esper_functional._errors import LayerShapeError
from esper_functional._layers._checks import (
    check_choice,
    check_divides,
    check_dtype,
    check_features,
    check_one_dtype,
    check_param,
    check_rank,
    check_sizes,
    check_weight_rank,
    described,
    is_integer,
)
from esper_functional._layers._precision import uniform

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[PaddingMode, ...] = get_args(PaddingMode)

_NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
_NAMED_PADDINGS = ("same", "valid")

Pair = int | tuple[int, int]
"""One number for both axes, or one for the height and one for the width."""


class Conv2dParams(TypedDict):
    """Parameters of a convolution, laid out as in PyTorch and Equinox."""

    weight: Float[Array, "out in_per_group kernel_height kernel_width"]
    bias: NotRequired[Float[Array, " out"]]


def init_conv2d(
    key: PRNGKeyArray,
    in_channels: int,
    out_channels: int,
    kernel_size: Pair,
    *,
    groups: int = 1,
    bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Conv2dParams:
    """Uniform in ±1/√fan_in, the default of `torch.nn.Conv2d`.

    fan_in is in_channels / groups · kernel height · kernel width. The weight is the same
    with and without a bias, and in half precision it is that of float32, rounded.

    Raises:
        LayerShapeError: for sizes below 1, groups that do not divide the channels, and
            dtypes that are not floating.
    """
    where = "init_conv2d"
    check_sizes(where, in_channels=in_channels, out_channels=out_channels)
    check_divides(where, "groups", groups, in_channels=in_channels, out_channels=out_channels)
    check_dtype(where, dtype)
    kernel = _pair(where, "kernel_size", kernel_size, 1)
    bound = (in_channels // groups * kernel[0] * kernel[1]) ** -0.5
    weight_key, bias_key = jax.random.split(key)
    shape = (out_channels, in_channels // groups, *kernel)
    params: Conv2dParams = {"weight": uniform(weight_key, shape, bound, dtype)}
    if bias:
        params["bias"] = uniform(bias_key, (out_channels,), bound, dtype)
    return params


def conv2d(
    params: Conv2dParams,
    x: Float[Array, "*batch in height width"],
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    padding_mode: str = "zeros",
    dilation: Pair = 1,
    groups: int = 1,
) -> Float[Array, "*batch out out_height out_width"]:
    """Cross-correlation plus bias, as `torch.nn.Conv2d` defines it, over any leading axes.

        y[o, i, j] = b[o] + Σ_{c, u, v} W[o, c, u, v] · x̃[c, i·stride + u·dilation, …]

    with x̃ the padded input and c over the channels of o's group.

    Args:
        params: weight `[out, in / groups, kernel height, kernel width]` and bias `[out]`.
        x: `[*batch, in, height, width]`.
        stride: at least 1.
        padding: rows and columns added on each side; "valid" for none, "same" for an output
            of the input's size, which needs stride 1. Where "same" adds an odd number, the
            end gets one more than the beginning, as in PyTorch.
        padding_mode: what is added: "zeros", "reflect" (without the edge; less than the
            input's size), "replicate" (the edge) or "circular" (at most the input's size).
        dilation: distance of the kernel's taps, at least 1.
        groups: channels are convolved in so many separate groups.

    Raises:
        LayerShapeError: at trace time, for an input that does not fit the parameters or an
            option that is none.
    """
    where, axes = "conv2d", "[*batch, in, height, width]"
    weight = params["weight"]
    check_one_dtype(where, x, **params)
    check_weight_rank(where, weight, "out in/groups height width")
    check_rank(where, x, axes, 3)
    check_divides(where, "groups", groups, out_channels=weight.shape[0])
    check_features(where, x, axes, -3, weight.shape[1] * groups)
    check_choice(where, "padding_mode", padding_mode, PADDING_MODES)
    strides = _pair(where, "stride", stride, 1)
    dilations = _pair(where, "dilation", dilation, 1)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True))
    pads = _pads(padding, strides, spans)
    _check_room(x, pads, padding_mode, spans)

    images = x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:])
    if padding_mode != "zeros" and any(sum(ends) for ends in pads):
        images = jnp.pad(images, ((0, 0), (0, 0), *pads), mode=_NUMPY_MODES[padding_mode])
        pads = ((0, 0), (0, 0))
    y = jax.lax.conv_general_dilated(
        images,
        weight,
        strides,
        pads,
        rhs_dilation=dilations,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
    )
    if "bias" in params:
        check_param(where, "bias", params["bias"], weight.shape[:1])
        y = y + params["bias"][:, None, None]
    return y if x.ndim == 4 else y.reshape(*x.shape[:-3], *y.shape[1:])


def _pair(where: str, name: str, value: Any, least: int) -> tuple[int, int]:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(is_integer(n) and n >= least for n in pair):
        raise LayerShapeError(
            f"{where}: expected {name} to be an integer of at least {least}, or a pair of them"
            f" for height and width; got {value!r}"
        )
    return pair


def _pads(
    padding: Any, strides: tuple[int, int], spans: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """What is added before and after each axis."""
    if not isinstance(padding, str):
        return tuple((n, n) for n in _pair("conv2d", "padding", padding, 0))
    check_choice("conv2d", "padding", padding, _NAMED_PADDINGS)
    if padding == "valid":
        return ((0, 0), (0, 0))
    if strides != (1, 1):
        raise LayerShapeError(
            f"conv2d: expected stride 1 with padding 'same'; got stride {strides}. Give the"
            " padding in numbers"
        )
    return tuple(((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans)


def _check_room(
    x: Any, pads: tuple[tuple[int, int], ...], mode: str, spans: tuple[int, ...]
) -> None:
    for name, size, ends, span in zip(("height", "width"), x.shape[-2:], pads, spans, strict=True):
        most = {"reflect": size - 1, "circular": size}.get(mode, max(ends))
        if max(ends) > most:
            raise LayerShapeError(
                f"conv2d: expected a padding of at most {most} with padding_mode {mode!r} along"
                f" a {name} of {size}; got {max(ends)} for an input {described(x)}. Pad less, or"
                " with 'zeros' or 'replicate'"
            )
        if size + sum(ends) < span:
            raise LayerShapeError(
                f"conv2d: expected a {name} of at least {span - sum(ends)} for a kernel that spans"
                f" {span} and a padding of {ends}; got an input {described(x)}. Pad more, or"
                " choose a smaller kernel or dilation"
            )

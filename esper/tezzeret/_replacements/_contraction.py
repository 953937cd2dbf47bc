"""Products, convolutions and attention."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from esper.tezzeret._ops._base import narrow, wide

F = "nn.functional."


def _pairs(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values


def _padding(value: Any, window: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    if value == "valid":
        return [(0, 0)] * len(window)
    if value == "same":
        reach = [d * (size - 1) for d, size in zip(dilation, window, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]
    return [(p, p) for p in _pairs(value, len(window))]


def _convolution(axes: int) -> Callable[..., Any]:
    form = ("NCH", "OIH", "NCH") if axes == 1 else ("NCHW", "OIHW", "NCHW")

    def apply(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        spread = _pairs(dilation, axes)
        y = lax.conv_general_dilated(
            x,
            weight,
            window_strides=_pairs(stride, axes),
            padding=_padding(padding, weight.shape[2:], spread),
            rhs_dilation=spread,
            feature_group_count=groups,
            dimension_numbers=form,
        )
        if bias is None:
            return y
        return narrow(wide(y) + wide(bias).reshape(-1, *(1,) * axes), y)

    return apply


def _addmm(bias: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Any:
    return beta * bias + alpha * (a @ b)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    if dropout_p:
        raise NotImplementedError("attention with dropout")
    q, k, v = wide(query), wide(key), wide(value)
    weights = q @ jnp.swapaxes(k, -2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        mask = jnp.tril(jnp.ones(weights.shape[-2:], bool))
    if mask is not None:
        if mask.dtype == jnp.bool_:
            weights = jnp.where(mask, weights, -jnp.inf)
        else:
            weights = weights + wide(mask)
    return narrow(jax.nn.softmax(weights, axis=-1) @ v, query)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    y = x @ weight.T
    return y if bias is None else narrow(wide(y) + wide(bias), y)


CONTRACTIONS: dict[str, Callable[..., Any]] = {
    F + "linear": _linear,
    F + "conv1d": _convolution(1),
    F + "conv2d": _convolution(2),
    F + "scaled_dot_product_attention": _attention,
    "matmul": jnp.matmul,
    "mm": jnp.matmul,
    "bmm": jnp.matmul,
    "addmm": _addmm,
    "einsum": lambda equation, tensors: jnp.einsum(equation, *tensors),
}

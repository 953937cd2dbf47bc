"""Pooling over space."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from esper.tezzeret._ops._base import narrow, wide
from esper.tezzeret._replacements._contraction import _pairs

F = "nn.functional."


def _reduced(x: Any, start: Any, function: Any, window: Any, stride: Any, padding: Any) -> Any:
    axes = x.ndim - 2
    steps = window if stride is None or list(_pairs(stride, axes)) == [] else stride
    return lax.reduce_window(
        x,
        start,
        function,
        (1, 1, *_pairs(window, axes)),
        (1, 1, *_pairs(steps, axes)),
        ((0, 0), (0, 0), *((p, p) for p in _pairs(padding, axes))),
    )


def _sums(x: Any, window: Any, stride: Any, padding: Any) -> Any:
    return _reduced(x, np.array(0, x.dtype), lax.add, window, stride, padding)


def _avg_pool(
    x: Any,
    window: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Any:
    if ceil_mode:
        raise NotImplementedError("an average over windows that reach beyond the end (ceil_mode)")
    y = wide(x)
    total = _sums(y, window, stride, padding)
    if count_include_pad:
        return narrow(total / float(np.prod(_pairs(window, x.ndim - 2))), x)
    count = _sums(jnp.ones((1, 1, *x.shape[2:]), y.dtype), window, stride, padding)
    return narrow(total / count, x)


def _max_pool(
    x: Any,
    window: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    if ceil_mode or set(_pairs(dilation, x.ndim - 2)) != {1}:
        raise NotImplementedError("a maximum with dilation or ceil_mode")
    return _reduced(x, np.array(-np.inf, x.dtype), lax.max, window, stride, padding)


def _adaptive_avg_pool(x: Any, output_size: Any) -> Any:
    made = _pairs(output_size, x.ndim - 2)
    sizes = x.shape[2:]
    if any(size % out for size, out in zip(sizes, made, strict=True)):
        raise NotImplementedError(
            f"an adaptive average of {sizes} into {made}, which do not divide"
        )
    window = [size // out for size, out in zip(sizes, made, strict=True)]
    return _avg_pool(x, window)


POOLS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((F + "avg_pool1d", F + "avg_pool2d"), _avg_pool),
    **dict.fromkeys((F + "max_pool1d", F + "max_pool2d"), _max_pool),
    **dict.fromkeys((F + "adaptive_avg_pool1d", F + "adaptive_avg_pool2d"), _adaptive_avg_pool),
}

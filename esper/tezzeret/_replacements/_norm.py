"""Normalisations, softmax, and sums over axes. Variances of norms are biased."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from esper.tezzeret._ops._base import narrow, wide

F = "nn.functional."


def _standardised(x: Any, axes: tuple[int, ...], eps: float) -> Any:
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + eps)


def _scaled(y: Any, weight: Any, bias: Any, shape: Sequence[int]) -> Any:
    if weight is not None:
        y = y * wide(weight).reshape(shape)
    return y if bias is None else y + wide(bias).reshape(shape)


def _layer_norm(
    x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    axes = tuple(range(-len(shape), 0))
    return narrow(_scaled(_standardised(wide(x), axes, eps), weight, bias, tuple(shape)), x)


def _rms_norm(x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    y = wide(x)
    axes = tuple(range(-len(shape), 0))
    least = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    y = y * lax.rsqrt(jnp.mean(y * y, axes, keepdims=True) + least)
    return narrow(_scaled(y, weight, None, tuple(shape)), x)


def _per_channel(x: Any) -> tuple[int, ...]:
    return (-1, *(1,) * (x.ndim - 2))


def _group_norm(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    grouped = wide(x).reshape(x.shape[0], groups, -1)
    y = _standardised(grouped, (-1,), eps).reshape(x.shape)
    return narrow(_scaled(y, weight, bias, _per_channel(x)), x)


def _batch_norm(
    x: Any,
    mean: Any,
    variance: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        raise NotImplementedError("batch norm in training")
    shape = _per_channel(x)
    centred = wide(x) - wide(mean).reshape(shape)
    y = centred * lax.rsqrt(wide(variance).reshape(shape) + eps)
    return narrow(_scaled(y, weight, bias, shape), x)


def _axes(dim: Any) -> Any:
    return tuple(dim) if isinstance(dim, list | tuple) else dim


def _over(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        return narrow(function(wide(x), axis=_axes(dim), keepdims=keepdim), x)

    return apply


def _variance(
    x: Any, dim: Any = None, unbiased: bool = True, correction: Any = None, keepdim: bool = False
) -> Any:
    correction = int(unbiased) if correction is None else correction
    return narrow(jnp.var(wide(x), _axes(dim), correction=correction, keepdims=keepdim), x)


NORMS: dict[str, Callable[..., Any]] = {
    F + "layer_norm": _layer_norm,
    F + "rms_norm": _rms_norm,
    F + "group_norm": _group_norm,
    F + "batch_norm": _batch_norm,
    "softmax": lambda x, dim: narrow(jax.nn.softmax(wide(x), axis=dim), x),
    "log_softmax": lambda x, dim: narrow(jax.nn.log_softmax(wide(x), axis=dim), x),
    "mean": _over(jnp.mean),
    "sum": _over(jnp.sum),
    "amax": _over(jnp.max),
    "logsumexp": _over(jax.nn.logsumexp),
    "var": _variance,
}

"""Layer normalisation.

J. L. Ba, J. R. Kiros and G. E. Hinton, Layer Normalization, 2016.
"""

from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esper_functional._errors import LayerShapeError
from esper_functional._layers._checks import (
    check_dtype,
    check_one_dtype,
    check_param,
    check_sizes,
    described,
)
from esper_functional._layers._precision import widened


class LayerNormParams(TypedDict):
    """Parameters of a layer normalisation, as in PyTorch."""

    weight: Float[Array, "*normalised"]
    bias: NotRequired[Float[Array, "*normalised"]]


def init_layer_norm(
    shape: int | tuple[int, ...], *, bias: bool = True, dtype: DTypeLike = jnp.float32
) -> LayerNormParams:
    """Weights 1 and biases 0, as in `torch.nn.LayerNorm`.

    Args:
        shape: of the trailing axes that are normalised together; a number for one axis.

    Raises:
        LayerShapeError: for no axis, sizes below 1, and dtypes that are not floating.
    """
    axes = shape if isinstance(shape, tuple) else (shape,)
    _check_some_axis("init_layer_norm", axes)
    for size in axes:
        check_sizes("init_layer_norm", shape=size)
    check_dtype("init_layer_norm", dtype)
    params: LayerNormParams = {"weight": jnp.ones(axes, dtype)}
    if bias:
        params["bias"] = jnp.zeros(axes, dtype)
    return params


def layer_norm(
    params: LayerNormParams, x: Float[Array, "*shape"], *, eps: float = 1e-5
) -> Float[Array, "*shape"]:
    """(x − mean) / √(var + eps) · weight + bias, over the trailing axes that the weight has.

    The variance is the biased one. For inputs of half precision everything is computed in
    float32 and rounded once.

    Args:
        params: weight and bias `[*normalised]`.
        x: `[*batch, *normalised]`.
        eps: added to the variance.

    Raises:
        LayerShapeError: at trace time, for an input that does not fit the parameters.
    """
    weight = params["weight"]
    check_one_dtype("layer_norm", x, **params)
    _check_some_axis("layer_norm", weight.shape)
    if x.shape[x.ndim - weight.ndim :] != weight.shape or x.ndim < weight.ndim:
        raise LayerShapeError(
            "layer_norm: expected an input whose trailing axes are the weight's,"
            f" {list(weight.shape)}; got {described(x)}"
        )
    axes = tuple(range(-weight.ndim, 0))
    wide = widened(x.dtype)
    centred = x.astype(wide) - jnp.mean(x.astype(wide), axis=axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps) * weight.astype(wide)
    if "bias" in params:
        check_param("layer_norm", "bias", params["bias"], weight.shape)
        y = y + params["bias"].astype(wide)
    return y.astype(x.dtype)


def _check_some_axis(where: str, axes: tuple[int, ...]) -> None:
    if not axes:
        raise LayerShapeError(f"{where}: expected at least one axis to normalise; got a shape []")

"""Linear layers."""

from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from esper_functional._layers._checks import (
    check_dtype,
    check_features,
    check_one_dtype,
    check_param,
    check_rank,
    check_sizes,
    check_weight_rank,
)
from esper_functional._layers._precision import uniform


class LinearParams(TypedDict):
    """Parameters of a linear layer, laid out as in PyTorch and Equinox."""

    weight: Float[Array, "out in"]
    bias: NotRequired[Float[Array, " out"]]


def init_linear(
    key: PRNGKeyArray,
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> LinearParams:
    """Uniform in ±1/√in_features, the default of `torch.nn.Linear` and `eqx.nn.Linear`.

    The weight is the same with and without a bias, and in half precision it is that of
    float32, rounded.

    Raises:
        LayerShapeError: for sizes below 1 and dtypes that are not floating.
    """
    check_sizes("init_linear", in_features=in_features, out_features=out_features)
    check_dtype("init_linear", dtype)
    bound = in_features**-0.5
    weight_key, bias_key = jax.random.split(key)
    params: LinearParams = {
        "weight": uniform(weight_key, (out_features, in_features), bound, dtype)
    }
    if bias:
        params["bias"] = uniform(bias_key, (out_features,), bound, dtype)
    return params


def linear(params: LinearParams, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """x·Wᵀ + b, over any leading axes.

    Raises:
        LayerShapeError: at trace time, for an input that does not fit the parameters.
    """
    return project("linear", params, x)


def project(
    where: str, params: LinearParams, x: Float[Array, "*batch in"]
) -> Float[Array, "*batch out"]:
    """`linear`, under the name that its errors give."""
    weight = params["weight"]
    check_one_dtype(where, x, **params)
    check_weight_rank(where, weight, "out in")
    check_rank(where, x, "[*batch, in]", 1)
    check_features(where, x, "[*batch, in]", -1, weight.shape[1])
    y = x @ weight.T
    if "bias" not in params:
        return y
    check_param(where, "bias", params["bias"], weight.shape[:1])
    return y + params["bias"]

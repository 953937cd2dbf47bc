"""Host layers as pairs of pure functions."""

from typing import TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class LinearParams(TypedDict):
    """Parameters of a linear layer, laid out as in PyTorch and Equinox."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]


def init_linear(key: PRNGKeyArray, in_features: int, out_features: int) -> LinearParams:
    """Uniform in ±1/√in_features, the default of `torch.nn.Linear` and `eqx.nn.Linear`."""
    bound = in_features**-0.5
    weight_key, bias_key = jax.random.split(key)
    return {
        "weight": jax.random.uniform(
            weight_key, (out_features, in_features), jnp.float32, -bound, bound
        ),
        "bias": jax.random.uniform(bias_key, (out_features,), jnp.float32, -bound, bound),
    }


def linear(params: LinearParams, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """x·Wᵀ + b, over any leading axes."""
    return x @ params["weight"].T + params["bias"]

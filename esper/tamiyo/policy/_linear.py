"""Maps and choices of an array's rows, in the form that compilers make fast."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float


def parameters_of(layer: eqx.nn.Linear) -> tuple[Array, Array]:
    """The weight, `[outputs, inputs]`, and the bias, `[outputs]`, of a layer that has one."""
    assert layer.bias is not None, "every linear layer of a policy has a bias"
    return layer.weight, layer.bias


def mapped(weight: Float[Array, "outputs inputs"], values: Any) -> Float[Array, "*leading outputs"]:
    """The product with each row of `values`, `[*leading, inputs]`."""
    rows = values.reshape(-1, values.shape[-1])
    # With the weight first nothing is turned round before the product.
    return (weight @ rows.T).T.reshape(*values.shape[:-1], -1)


def rows(values: Array, at: Any) -> Array:
    """The rows at places that are known to be there."""
    return values.at[at].get(mode="promise_in_bounds")

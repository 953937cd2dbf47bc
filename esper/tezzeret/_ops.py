"""The operations a blueprint may use, each defined once for both backends.

A row gives the shape rule, the parameters, the jax function and the TorchScript
expression. The two programs of a kernel are generated side by side from these
rows, never translated from one another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation on examples without their batch axis."""

    arity: int
    """Number of inputs; `MANY` for two or more of one shape."""
    jax: Callable[..., Any]
    """`(inputs, params) -> output`, over a leading batch axis."""
    torch: Callable[[list[str], dict[str, str]], str]
    """`(input names, parameter names) -> expression`."""
    flops: Callable[[Shape, Shape], int]
    """Floating-point operations per example, from input and output shape."""
    has_weights: bool = False


MANY = -1


def _size(shape: Shape) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


def _linear(inputs: list[Any], params: dict[str, Any]) -> Any:
    y = inputs[0] @ params["weight"].T
    return y + params["bias"] if "bias" in params else y


def _linear_torch(inputs: list[str], params: dict[str, str]) -> str:
    bias = params.get("bias", "None")
    return f"torch.nn.functional.linear({inputs[0]}, {params['weight']}, {bias})"


def _pointwise(function: Callable[[Any], Any], expression: str, cost: int) -> Op:
    return Op(
        arity=1,
        jax=lambda inputs, _: function(inputs[0]),
        torch=lambda inputs, _: expression.format(inputs[0]),
        flops=lambda _, out: cost * _size(out),
    )


def _fold(function: Callable[[Any, Any], Any], name: str) -> Op:
    def run(inputs: list[Any], _: dict[str, Any]) -> Any:
        total = inputs[0]
        for other in inputs[1:]:
            total = function(total, other)
        return total

    def write(inputs: list[str], _: dict[str, str]) -> str:
        total = inputs[0]
        for other in inputs[1:]:
            total = f"{name}({total}, {other})"
        return total

    return Op(MANY, run, write, lambda _, out: _size(out))


def _exact_gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


# The costs of activations follow the usual convention of counting each
# elementary function as one operation.
OPS: dict[str, Op] = {
    "linear": Op(
        1, _linear, _linear_torch, lambda a, b: (2 * a[-1] + 1) * _size(b), has_weights=True
    ),
    "relu": _pointwise(jax.nn.relu, "torch.relu({})", 1),
    "gelu": _pointwise(_exact_gelu, 'torch.nn.functional.gelu({}, approximate="none")', 4),
    # torch's own silu drags torch/nn/functional.py into the archive.
    "silu": _pointwise(jax.nn.silu, "torch.mul({0}, torch.sigmoid({0}))", 4),
    "sigmoid": _pointwise(jax.nn.sigmoid, "torch.sigmoid({})", 3),
    "tanh": _pointwise(jnp.tanh, "torch.tanh({})", 1),
    "add": _fold(jnp.add, "torch.add"),
    "multiply": _fold(jnp.multiply, "torch.mul"),
}

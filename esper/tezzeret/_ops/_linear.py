"""Linear maps of the last axis."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from esper.tezzeret._ops._base import (
    Dim,
    Init,
    Op,
    OpError,
    Outline,
    Param,
    Shape,
    narrow,
    volume,
    wide,
)


class Linear(Op):
    """`x W^T + b` over the last axis."""

    op: Literal["linear"] = "linear"
    SIZES: ClassVar[tuple[str, ...]] = ("features",)

    features: Dim
    """Output features: a number, `in`, `out`, or one of the blueprint's sizes."""
    bias: bool = True
    init: Literal["fan_in", "zeros", "identity"] = "fan_in"
    """`fan_in`: uniform in ±1/√(input features), biases too (PyTorch's default); `zeros`: all zero;
    `identity`: the identity matrix, biases zero."""

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        features, size = int(self.features), shape[-1]
        if self.init == "identity" and features != size:
            raise OpError(
                f"linear with `init: identity` needs as many features as it takes ({size}), got"
                f" {features}"
            )
        params = {"weight": Param((features, size), self.init, size)}
        if self.bias:
            bias: Init = "fan_in" if self.init == "fan_in" else "zeros"
            params["bias"] = Param((features,), bias, size)
        result = (*shape[:-1], features)
        return Outline(result, params, volume(result) * size, volume(result) if self.bias else 0)

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        y = inputs[0] @ params["weight"].T
        return narrow(wide(y) + wide(params["bias"]), y) if "bias" in params else y

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        bias = params.get("bias", "None")
        return f"torch.nn.functional.linear({inputs[0]}, {params['weight']}, {bias})"

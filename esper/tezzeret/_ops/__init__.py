"""The operations a blueprint may use, each defined once for both backends.

A class gives an operation's attributes, its shape rule, its parameters, its function in jax and its
expression in TorchScript. The two programs of a kernel are generated side by side from these,
never translated from one another.
"""

from typing import Annotated, get_args

from pydantic import Field

from esper.tezzeret._ops._attention import Attention
from esper.tezzeret._ops._base import Dim, Init, Name, Op, OpError, Outline, Param, Shape
from esper.tezzeret._ops._combine import Add, Concat, Multiply, Residual
from esper.tezzeret._ops._convolution import Conv1d, Conv2d
from esper.tezzeret._ops._linear import Linear
from esper.tezzeret._ops._norm import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from esper.tezzeret._ops._pointwise import Activation, Dropout, LayerScale, Scale, Softmax
from esper.tezzeret._ops._pool import AvgPool, MaxPool, Mean, SqueezeExcite
from esper.tezzeret._ops._shape import Reshape, Transpose

__all__ = [
    "OPS", "AnyOp", "Dim", "Init", "Name", "Op", "OpError", "Outline", "Param", "Shape",
]  # fmt: skip

AnyOp = Annotated[
    Activation | Add | Attention | AvgPool | BatchNorm | Concat | Conv1d | Conv2d | Dropout
    | GroupNorm | LayerNorm | LayerScale | Linear | MaxPool | Mean | Multiply | Residual | Reshape
    | RMSNorm | Scale | Softmax | SqueezeExcite | Transpose,
    Field(discriminator="op"),
]  # fmt: skip

OPS: dict[str, type[Op]] = {
    name: kind
    for kind in get_args(get_args(AnyOp)[0])
    for name in get_args(kind.model_fields["op"].annotation)
}
"""By the name that blueprints use."""

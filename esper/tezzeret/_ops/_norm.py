"""Normalisations. Variances are biased, and everything is computed in float32 or wider."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax import lax
from pydantic import Field

from esper.tezzeret._ops._base import Dim, Op, OpError, Outline, Param, Shape, narrow, volume, wide


class _Norm(Op):
    epsilon: float = Field(default=1e-5, gt=0.0, le=0.1)
    init: Literal["ones", "zeros"] = "ones"
    """Of the scale. Zeros make a residual branch silent at birth (Goyal et al., Accurate, Large
    Minibatch SGD, 2017, arXiv:1706.02677)."""


def _standardised(x: Any, axes: tuple[int, ...], epsilon: float) -> Any:
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + epsilon)


class LayerNorm(_Norm):
    """Over the last axis (Ba et al., Layer Normalization, 2016, arXiv:1607.06450)."""

    op: Literal["layer_norm"] = "layer_norm"

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        params = {"weight": Param(shape[-1:], self.init), "bias": Param(shape[-1:], "zeros")}
        return Outline(shape, params, 0, 8 * volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        y = _standardised(wide(inputs[0]), (-1,), self.epsilon)
        return narrow(y * wide(params["weight"]) + wide(params["bias"]), inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        weight, bias = params["weight"], params["bias"]
        size = shapes[0][-1]
        return f"torch.layer_norm({inputs[0]}, [{size}], {weight}, {bias}, {self.epsilon!r})"


class RMSNorm(_Norm):
    """Over the last axis, without a mean (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    op: Literal["rms_norm"] = "rms_norm"

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        return Outline(shape, {"weight": Param(shape[-1:], self.init)}, 0, 4 * volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        x = wide(inputs[0])
        y = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        return narrow(y * wide(params["weight"]), inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return (
            f"torch.rms_norm({inputs[0]}, [{shapes[0][-1]}], {params['weight']}, {self.epsilon!r})"
        )


class GroupNorm(_Norm):
    """Over groups of channels and all of space, of examples `[channels, *space]`.

    Wu and He, Group Normalization, 2018, arXiv:1803.08494.
    """

    op: Literal["group_norm"] = "group_norm"
    SIZES: ClassVar[tuple[str, ...]] = ("groups",)
    groups: Dim = 1

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        if shape[0] % int(self.groups):
            raise OpError(
                f"group_norm with {self.groups} groups: they must divide the channels, and"
                f" {self.inputs[0]!r} gives {shape}"
            )
        params = {"weight": Param(shape[:1], self.init), "bias": Param(shape[:1], "zeros")}
        return Outline(shape, params, 0, 8 * volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        x = wide(inputs[0])
        grouped = x.reshape(x.shape[0], int(self.groups), -1)
        y = _standardised(grouped, (-1,), self.epsilon).reshape(x.shape)
        return narrow(_per_channel(y, params), inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        weight, bias = params["weight"], params["bias"]
        return (
            f"torch.group_norm({inputs[0]}, {int(self.groups)}, {weight}, {bias},"
            f" {self.epsilon!r}, False)"
        )


class BatchNorm(_Norm):
    """Over the batch and all of space, of examples `[features]` or `[channels, *space]`.

    It takes the statistics of the batch that it is given, in training and in evaluation, as
    PyTorch's layers do with `track_running_stats=False`: a kernel is a function of its parameters
    and its input, and has no running statistics. So what it gives depends on the batch, and in a
    network that is written for one example and mapped over them, its batch is one.
    Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167.
    """

    op: Literal["batch_norm"] = "batch_norm"
    MIXES_BATCH: ClassVar[bool] = True

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        params = {"weight": Param(shape[:1], self.init), "bias": Param(shape[:1], "zeros")}
        return Outline(shape, params, 0, 8 * volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        x = wide(inputs[0])
        axes = (0, *range(2, x.ndim))
        return narrow(_per_channel(_standardised(x, axes, self.epsilon), params), inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        weight, bias = params["weight"], params["bias"]
        return (
            f"torch.batch_norm({inputs[0]}, {weight}, {bias}, None, None, True, 0.0,"
            f" {self.epsilon!r}, False)"
        )


def _per_channel(y: Any, params: Mapping[str, Any]) -> Any:
    space = (1,) * (y.ndim - 2)
    weight, bias = (wide(params[role]).reshape(-1, *space) for role in ("weight", "bias"))
    return y * weight + bias

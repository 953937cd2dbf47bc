"""Convolutions of one and two axes, over examples `[channels, *space]`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from jax import lax
from pydantic import Field

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


class _Convolution(Op):
    """A convolution with weights `[out, in / groups, *window]`, as PyTorch lays them out."""

    SIZES: ClassVar[tuple[str, ...]] = ("features", "groups", "stride")
    AXES: ClassVar[int]

    features: Dim
    """Output channels."""
    window: int = Field(default=3, ge=1, le=63)
    """Size of the kernel along each axis."""
    stride: Dim = 1
    padding: Literal["same"] | int = Field(default="same", union_mode="left_to_right")
    """Zeros before and after each axis; `same` is half of the window, which must be odd, so that a
    stride of 1 keeps the size."""
    dilation: int = Field(default=1, ge=1, le=63)
    groups: Dim = 1
    """`in` makes it depthwise."""
    bias: bool = True
    init: Literal["fan_in", "zeros", "identity"] = "fan_in"
    """`fan_in`: uniform in ±1/√(inputs of one output), biases too (PyTorch's default); `zeros`;
    `identity`: a Dirac kernel, which passes each channel through, and biases zero."""

    def _pad(self) -> int:
        if self.padding == "same":
            if self.window % 2 == 0:
                raise OpError(
                    f"{self.kind} with `padding: same` needs an odd window, got {self.window}"
                )
            return self.dilation * (self.window - 1) // 2
        return int(self.padding)

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        if len(shape) != 1 + self.AXES:
            form = "[channels, length]" if self.AXES == 1 else "[channels, height, width]"
            raise OpError(
                f"{self.kind} takes examples {form}, and {self.inputs[0]!r} gives {shape}"
            )
        channels, features, groups = shape[0], int(self.features), int(self.groups)
        if channels % groups or features % groups:
            raise OpError(
                f"{self.kind} with {groups} groups: they must divide the channels it takes"
                f" ({channels}) and gives ({features})"
            )
        pad = self._pad()
        reach = self.dilation * (self.window - 1) + 1
        if not 0 <= pad < reach:
            raise OpError(
                f"{self.kind}: `padding` must be from 0 to {reach - 1}, what its window reaches,"
                f" got {pad}"
            )
        space = tuple((size + 2 * pad - reach) // int(self.stride) + 1 for size in shape[1:])
        if min(space) < 1:
            raise OpError(
                f"{self.kind}: its window reaches over {reach}, and {self.inputs[0]!r} gives"
                f" {shape}"
            )
        inner = channels // groups
        fan_in = inner * self.window**self.AXES
        if self.init == "identity" and channels != features:
            raise OpError(
                f"{self.kind} with `init: identity` needs as many channels as it takes"
                f" ({channels}), got {features}"
            )
        window = (self.window,) * self.AXES
        params = {"weight": Param((features, inner, *window), self.init, fan_in)}
        if self.bias:
            bias: Init = "fan_in" if self.init == "fan_in" else "zeros"
            params["bias"] = Param((features,), bias, fan_in)
        result = (features, *space)
        return Outline(result, params, volume(result) * fan_in, volume(result) if self.bias else 0)

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        pad = self._pad()
        y = lax.conv_general_dilated(
            inputs[0],
            params["weight"],
            window_strides=(int(self.stride),) * self.AXES,
            padding=[(pad, pad)] * self.AXES,
            rhs_dilation=(self.dilation,) * self.AXES,
            feature_group_count=int(self.groups),
            dimension_numbers=("NCH", "OIH", "NCH") if self.AXES == 1 else ("NCHW", "OIHW", "NCHW"),
        )
        if "bias" not in params:
            return y
        return narrow(wide(y) + wide(params["bias"]).reshape(-1, *(1,) * self.AXES), y)

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        def each(value: int) -> str:
            return str([value] * self.AXES)

        bias = params.get("bias", "None")
        return (
            f"torch.{self.kind}({inputs[0]}, {params['weight']}, {bias}, {each(int(self.stride))},"
            f" {each(self._pad())}, {each(self.dilation)}, {int(self.groups)})"
        )


class Conv1d(_Convolution):
    """A convolution along time, over examples `[channels, length]`."""

    op: Literal["conv1d"] = "conv1d"
    AXES: ClassVar[int] = 1


class Conv2d(_Convolution):
    """A convolution of images `[channels, height, width]`."""

    op: Literal["conv2d"] = "conv2d"
    AXES: ClassVar[int] = 2

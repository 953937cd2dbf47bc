"""Pooling over space, of examples `[channels, length]` or `[channels, height, width]`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from pydantic import Field

from esper.tezzeret._ops._base import Dim, Op, OpError, Outline, Param, Shape, narrow, volume, wide
from esper.tezzeret._ops._pointwise import batched, check_axis


class _Pool(Op):
    SIZES: ClassVar[tuple[str, ...]] = ("stride",)

    window: int = Field(default=2, ge=1, le=63)
    stride: Dim | None = None
    """By default the window."""
    padding: int = Field(default=0, ge=0, le=31)
    """At most half of the window. An average counts padding as zeros, a maximum leaves it out."""

    def _stride(self) -> int:
        return self.window if self.stride is None else int(self.stride)

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        if len(shape) not in (2, 3):
            raise OpError(
                f"{self.kind} takes examples [channels, length] or [channels, height, width], and"
                f" {self.inputs[0]!r} gives {shape}"
            )
        if 2 * self.padding > self.window:
            raise OpError(
                f"{self.kind}: `padding` is at most half of the window ({self.window}), got"
                f" {self.padding}"
            )
        space = tuple(
            (size + 2 * self.padding - self.window) // self._stride() + 1 for size in shape[1:]
        )
        if min(space) < 1:
            raise OpError(
                f"{self.kind}: its window is {self.window}, and {self.inputs[0]!r} gives {shape}"
            )
        result = (shape[0], *space)
        return Outline(result, other_flops=volume(result) * self.window ** len(space))

    def _reduced(self, x: Any, start: Any, function: Any) -> Any:
        axes = x.ndim - 2
        return lax.reduce_window(
            x,
            start,
            function,
            (1, 1, *(self.window,) * axes),
            (1, 1, *(self._stride(),) * axes),
            ((0, 0), (0, 0), *((self.padding, self.padding),) * axes),
        )

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        axes = len(shapes[0]) - 1
        window, stride, padding = (
            [value] * axes for value in (self.window, self._stride(), self.padding)
        )
        where = "torch.nn.functional." if self.kind == "avg_pool" and axes == 2 else "torch."
        return f"{where}{self.kind}{axes}d({inputs[0]}, {window}, {stride}, {padding})"


class MaxPool(_Pool):
    """The maximum of each window. Of equal elements the first gets the gradient."""

    op: Literal["max_pool"] = "max_pool"

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        return self._reduced(inputs[0], np.array(-np.inf, inputs[0].dtype), lax.max)


class AvgPool(_Pool):
    """The mean of each window."""

    op: Literal["avg_pool"] = "avg_pool"

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        x = wide(inputs[0])
        total = self._reduced(x, np.array(0, x.dtype), lax.add)
        return narrow(total / float(self.window ** (x.ndim - 2)), inputs[0])


class Mean(Op):
    """The mean over some axes of an example, which go: global average pooling, for one."""

    op: Literal["mean"] = "mean"
    axes: list[int] = Field(min_length=1, max_length=3)

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        for axis in self.axes:
            check_axis(axis, shape, self)
        gone = {axis % len(shape) for axis in self.axes}
        if len(gone) != len(self.axes) or len(gone) == len(shape):
            raise OpError(f"mean over axes {self.axes} of {shape}: name each once, and leave one")
        kept = tuple(size for i, size in enumerate(shape) if i not in gone)
        return Outline(kept, other_flops=volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        axes = tuple(batched(axis) for axis in self.axes)
        return narrow(jnp.mean(wide(inputs[0]), axes), inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return f"torch.mean({inputs[0]}, {[batched(axis) for axis in self.axes]})"


class SqueezeExcite(Op):
    """Channels, each multiplied by a gate that is computed from the means of all of them.

    `x · sigmoid(W2 relu(W1 mean(x) + b1) + b2)` over examples `[channels, *space]`. Hu et al.,
    Squeeze-and-Excitation Networks, 2017, arXiv:1709.01507.
    """

    op: Literal["squeeze_excite"] = "squeeze_excite"
    SIZES: ClassVar[tuple[str, ...]] = ("features",)
    features: Dim
    """Of the layer between the two."""

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        if len(shape) not in (2, 3):
            raise OpError(
                f"squeeze_excite takes examples [channels, *space], and {self.inputs[0]!r} gives"
                f" {shape}"
            )
        channels, hidden = shape[0], int(self.features)
        params = {
            "squeeze_weight": Param((hidden, channels), "fan_in", channels),
            "squeeze_bias": Param((hidden,), "fan_in", channels),
            "excite_weight": Param((channels, hidden), "fan_in", hidden),
            "excite_bias": Param((channels,), "fan_in", hidden),
        }
        other = 2 * volume(shape) + 2 * hidden + 4 * channels
        return Outline(shape, params, 2 * channels * hidden, other)

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        (x,) = inputs
        p = {role: wide(value) for role, value in params.items()}
        space = tuple(range(2, x.ndim))
        hidden = jnp.mean(wide(x), space) @ p["squeeze_weight"].T + p["squeeze_bias"]
        gate = jnp.maximum(hidden, 0) @ p["excite_weight"].T + p["excite_bias"]
        gate = 1 / (1 + jnp.exp(-gate))
        return narrow(wide(x) * gate.reshape(*gate.shape, *(1,) * len(space)), x)

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        x, axes = inputs[0], len(shapes[0]) - 1
        means = f"torch.mean({x}, {list(range(2, 2 + axes))})"
        hidden = _linear(means, params["squeeze_weight"], params["squeeze_bias"])
        gate = _linear(f"torch.relu({hidden})", params["excite_weight"], params["excite_bias"])
        shape = [-1, shapes[0][0], *(1,) * axes]
        return f"torch.mul({x}, torch.reshape(torch.sigmoid({gate}), {shape}))"


def _linear(x: str, weight: str, bias: str) -> str:
    return f"torch.nn.functional.linear({x}, {weight}, {bias})"

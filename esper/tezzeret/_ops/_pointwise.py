"""Activations, scales, and what else acts on each element by itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from esper.tezzeret._ops._base import Op, OpError, Outline, Param, Shape, narrow, volume, wide


class Activation(Op):
    """A function of each element.

    `gelu` is the exact one, by the error function; `gelu_tanh` is its approximation by tanh
    (Hendrycks and Gimpel, 2016, arXiv:1606.08415). They differ by up to 5e-4.
    """

    op: Literal["relu", "elu", "gelu", "gelu_tanh", "silu", "sigmoid", "softplus", "tanh"]

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        return Outline(shape, other_flops=_ACTIVATIONS[self.op][2] * volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        return narrow(_ACTIVATIONS[self.op][0](wide(inputs[0])), inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return _ACTIVATIONS[self.op][1].format(inputs[0])


def _exact_gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


def _tanh_gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=True)


# The functions under `torch._C._nn` are what torch.nn.functional calls; of those that it wraps in
# Python, TorchScript would put the Python into the archive.
#
# The function, its expression in TorchScript, and its cost by the usual convention of counting
# each elementary function as one operation.
_ACTIVATIONS: dict[str, tuple[Any, str, int]] = {
    "relu": (jax.nn.relu, "torch.relu({})", 1),
    "elu": (jax.nn.elu, "torch._C._nn.elu({})", 3),
    "gelu": (_exact_gelu, 'torch.nn.functional.gelu({}, approximate="none")', 4),
    "gelu_tanh": (_tanh_gelu, 'torch.nn.functional.gelu({}, approximate="tanh")', 8),
    "silu": (jax.nn.silu, "torch._C._nn.silu({})", 4),
    "sigmoid": (jax.nn.sigmoid, "torch.sigmoid({})", 3),
    "softplus": (jax.nn.softplus, "torch._C._nn.softplus({})", 3),
    "tanh": (jnp.tanh, "torch.tanh({})", 1),
}


class Softmax(Op):
    """Along one axis of an example; by default the last one."""

    op: Literal["softmax"] = "softmax"
    axis: int = Field(default=-1, ge=-3, le=2)

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        check_axis(self.axis, shape, self)
        return Outline(shape, other_flops=5 * volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        return narrow(jax.nn.softmax(wide(inputs[0]), batched(self.axis)), inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return f"torch.softmax({inputs[0]}, {batched(self.axis)})"


class Scale(Op):
    """A constant factor, such as a residual branch is multiplied by."""

    op: Literal["scale"] = "scale"
    factor: float = Field(allow_inf_nan=False)

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        return Outline(shape, other_flops=volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        return narrow(wide(inputs[0]) * self.factor, inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return f"torch.mul({inputs[0]}, {self.factor!r})"


class LayerScale(Op):
    """A trained factor for each feature along one axis of an example; by default the last one.

    Touvron et al., Going deeper with Image Transformers, 2021, arXiv:2103.17239.
    """

    op: Literal["layer_scale"] = "layer_scale"
    axis: int = Field(default=-1, ge=-3, le=2)
    value: float = Field(default=1.0, allow_inf_nan=False)
    """Of every factor at birth."""

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        check_axis(self.axis, shape, self)
        init = "ones" if self.value else "zeros"
        param = Param((shape[self.axis],), init, value=self.value)
        return Outline(shape, {"weight": param}, other_flops=volume(shape))

    def _space(self, rank: int) -> tuple[int, ...]:
        """What the factors are reshaped to, for an example of some rank."""
        return (-1, *(1,) * (rank - 1 - self.axis % rank))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        factors = wide(params["weight"]).reshape(self._space(inputs[0].ndim - 1))
        return narrow(wide(inputs[0]) * factors, inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        space = list(self._space(len(shapes[0])))
        return f"torch.mul({inputs[0]}, torch.reshape({params['weight']}, {space}))"


class Dropout(Op):
    """Recorded in the blueprint, and the identity in its programs.

    A compiled kernel is a function of its parameters and its input alone, without random numbers
    and without modes, so that a run can be replayed; it is the kernel in evaluation. A module with
    dropout enters PyTorch by `kernel_from_module`.
    """

    op: Literal["dropout"] = "dropout"
    rate: float = Field(ge=0.0, lt=1.0)

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        return Outline(inputs[0])

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        return inputs[0]

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return inputs[0]


def check_axis(axis: int, shape: Shape, op: Op) -> None:
    """Refuse an axis that an input has not.

    Raises:
        OpError: with the axes there are.
    """
    rank = len(shape)
    if not -rank <= axis < rank:
        raise OpError(
            f"{op.kind}: `axis` must be from {-rank} to {rank - 1} for {op.inputs[0]!r}, which"
            f" gives {shape}; got {axis}"
        )


def batched(axis: int) -> int:
    """An axis of an example, as one of a batch."""
    return axis if axis < 0 else axis + 1

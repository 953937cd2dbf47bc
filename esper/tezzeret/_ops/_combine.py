"""Operations of several inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from pydantic import Field

from esper.tezzeret._ops._base import Op, OpError, Outline, Shape, narrow, same_shapes, volume, wide
from esper.tezzeret._ops._pointwise import batched, check_axis


class _Fold(Op):
    ARITY: ClassVar[tuple[int, int | None]] = (2, None)
    CALL: ClassVar[str]

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        shape = same_shapes(inputs, self.inputs, self.kind)
        return Outline(shape, other_flops=(len(inputs) - 1) * volume(shape))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        function = jnp.add if self.CALL == "torch.add" else jnp.multiply
        total = inputs[0]
        for other in inputs[1:]:
            total = function(total, other)
        return total

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        total = inputs[0]
        for other in inputs[1:]:
            total = f"{self.CALL}({total}, {other})"
        return total


class Add(_Fold):
    """The sum of two or more inputs of one shape."""

    op: Literal["add"] = "add"
    CALL: ClassVar[str] = "torch.add"


class Multiply(_Fold):
    """The product, element by element, of two or more inputs of one shape."""

    op: Literal["multiply"] = "multiply"
    CALL: ClassVar[str] = "torch.mul"


class Residual(Op):
    """`skip + factor · branch`.

    He et al., Deep Residual Learning for Image Recognition, 2015, arXiv:1512.03385.
    """

    op: Literal["residual"] = "residual"
    ARITY: ClassVar[tuple[int, int | None]] = (2, 2)
    factor: float = Field(default=1.0, allow_inf_nan=False)

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        shape = same_shapes(inputs, self.inputs, self.kind)
        return Outline(shape, other_flops=volume(shape) * (1 if self.factor == 1.0 else 2))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        skip, branch = map(wide, inputs)
        return narrow(skip + (branch if self.factor == 1.0 else branch * self.factor), inputs[0])

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        scaled = "" if self.factor == 1.0 else f", alpha={self.factor!r}"
        return f"torch.add({inputs[0]}, {inputs[1]}{scaled})"


class Concat(Op):
    """Inputs beside each other along one axis of an example; by default the last one."""

    op: Literal["concat"] = "concat"
    ARITY: ClassVar[tuple[int, int | None]] = (2, None)
    axis: int = Field(default=-1, ge=-3, le=2)

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        first = inputs[0]
        check_axis(self.axis, first, self)
        axis = self.axis % len(first)
        for name, shape in zip(self.inputs[1:], inputs[1:], strict=True):
            rest = [s for i, s in enumerate(shape) if i != axis]
            if len(shape) != len(first) or rest != [s for i, s in enumerate(first) if i != axis]:
                raise OpError(
                    f"concat along axis {self.axis} needs inputs that differ in it alone, and"
                    f" {self.inputs[0]!r} gives {first} where {name!r} gives {shape}"
                )
        size = sum(shape[axis] for shape in inputs)
        return Outline((*first[:axis], size, *first[axis + 1 :]))

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        return jnp.concatenate(inputs, batched(self.axis))

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return f"torch.cat([{', '.join(inputs)}], {batched(self.axis)})"

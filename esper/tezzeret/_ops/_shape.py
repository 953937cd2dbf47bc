"""Operations that move elements and change none."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from esper.contracts import Size
from esper.tezzeret._ops._base import Op, OpError, Outline, Shape, volume


class Reshape(Op):
    """An example's elements in another shape, in the same order."""

    op: Literal["reshape"] = "reshape"
    shape: list[Size] = Field(min_length=1, max_length=3)
    """Of one example; as many elements as before."""

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        wanted = tuple(self.shape)
        if volume(wanted) != volume(inputs[0]):
            raise OpError(
                f"reshape to {wanted} needs {volume(wanted)} elements, and {self.inputs[0]!r} gives"
                f" {inputs[0]}, which has {volume(inputs[0])}"
            )
        return Outline(wanted)

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        return inputs[0].reshape(inputs[0].shape[0], *self.shape)

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return f"torch.reshape({inputs[0]}, {[-1, *self.shape]})"


class Transpose(Op):
    """The two axes of an example swapped: `[time, features]` becomes `[features, time]`."""

    op: Literal["transpose"] = "transpose"
    RANK: ClassVar[int] = 2

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        (shape,) = inputs
        if len(shape) != self.RANK:
            raise OpError(
                f"transpose takes examples of two axes, and {self.inputs[0]!r} gives {shape}"
            )
        return Outline(shape[::-1])

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        return inputs[0].transpose(0, 2, 1)

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        return f"torch.transpose({inputs[0]}, 1, 2)"

"""What an operation is: its attributes, its shape rule, and what it is on both backends."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
from pydantic import BaseModel, ConfigDict, Field

from esper.contracts import Size

Shape = tuple[int, ...]
"""Of one example, without the batch axis."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]

Dim = (
    Size | Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*([*/][1-9][0-9]{0,5})?$", max_length=71)]
)
"""A number, a named size, or one times or over a number: `64`, `in`, `width`, `in*4`, `in/16`.

Divisions are rounded up."""

Init = Literal["fan_in", "zeros", "ones", "identity"]


class OpError(ValueError):
    """An operation cannot be applied to such inputs; says why, and nothing of where."""


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter of an operation."""

    shape: Shape
    init: Init
    fan_in: int = 1
    value: float = 1.0
    """What `ones` is multiplied by."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """What an operation makes of inputs of known shapes."""

    shape: Shape
    params: Mapping[str, Param] = dataclasses.field(default_factory=dict)
    """By role, such as `weight`."""
    multiply_adds: int = 0
    """Of its contractions, per example."""
    other_flops: int = 0
    """Per example; an elementary function counts as one operation."""

    @property
    def flops(self) -> int:
        """Floating-point operations per example, forward: two for a multiply-add."""
        return 2 * self.multiply_adds + self.other_flops


class Op(BaseModel, ABC):
    """One operation of a graph, as data: a name, what it reads, and its attributes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    ARITY: ClassVar[tuple[int, int | None]] = (1, 1)
    """The least and the greatest number of inputs; None for any."""
    SIZES: ClassVar[tuple[str, ...]] = ()
    """Attributes that may be named sizes."""
    MIXES_BATCH: ClassVar[bool] = False
    """Whether an example's output depends on the other examples of its batch."""

    name: Name
    inputs: list[Name] = Field(min_length=1)

    @property
    def kind(self) -> str:
        """The operation's name in blueprints, such as `linear`."""
        return self.__dict__["op"]

    def sized(self, size: Callable[[str], int]) -> "Op":
        """This operation with its named sizes as numbers."""
        named = {
            field: size(value)
            for field in self.SIZES
            if isinstance(value := getattr(self, field), str)
        }
        return self.model_copy(update=named) if named else self

    @abstractmethod
    def outline(self, inputs: Sequence[Shape]) -> Outline:
        """Shape, parameters and cost, for inputs of these shapes; sizes are numbers by now.

        Raises:
            OpError: where it cannot be applied to them.
        """

    @abstractmethod
    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        """The operation on arrays with a leading batch axis."""

    @abstractmethod
    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        """The same as an expression of TorchScript over names; `shapes` are the inputs'."""


def volume(shape: Shape) -> int:
    """Number of elements."""
    return math.prod(shape)


def wide(x: Any) -> Any:
    """In float32, where it is narrower: norms, softmax, means and activations are computed so.

    PyTorch does the same inside of its operations, and a sum of many bfloat16 values that is
    kept in bfloat16 stops growing.
    """
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def narrow(y: Any, like: Any) -> Any:
    """Back in the dtype of `like`."""
    return y.astype(like.dtype)


def same_shapes(inputs: Sequence[Shape], names: Sequence[str], what: str) -> Shape:
    """The one shape of all inputs.

    Raises:
        OpError: naming the two nodes that differ.
    """
    for name, shape in zip(names[1:], inputs[1:], strict=True):
        if shape != inputs[0]:
            raise OpError(
                f"{what} needs inputs of one shape, and {names[0]!r} gives {inputs[0]} where"
                f" {name!r} gives {shape}"
            )
    return inputs[0]

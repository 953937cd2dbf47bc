"""A module as a straight line of torch's operations over explicit parameters.

It is what both programs are made of: written out, it is the source that TorchScript compiles;
followed by torch2jax, it is a function of jax. The gate compares both with the module itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from esper.tezzeret._blueprint import INPUT


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor: the input, a parameter, a constant or an earlier result."""

    name: str


@dataclasses.dataclass(frozen=True)
class DType:
    """A dtype of torch, by its name."""

    name: str


Value: TypeAlias = "Ref | DType | int | float | bool | str | tuple[Value, ...] | None"
"""An argument; a tuple stands for a list."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One operation of ATen."""

    result: str
    operation: str
    arguments: Mapping[str, Value]
    """By the names of the operation's schema; those that are not given have its defaults."""
    positional: int
    """How many of them, from the first, are passed by position."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A module's graph: parameters and constants, and what is done with them, in order."""

    parameters: Mapping[str, str]
    """The reference of each parameter, by the module's own name for it."""
    constants: Mapping[str, np.ndarray]
    """float32, bfloat16 or bool, by reference."""
    calls: tuple[Call, ...]
    output: str


def line_source(line: Line) -> str:
    """The TorchScript method `forward(self, params..., x)`."""
    arguments = "".join(f"{name}: Tensor, " for name in line.parameters.values())
    lines = [f"def forward(self, {arguments}{INPUT}: Tensor) -> Tensor:"]
    lines += [f"    {name} = {_constant(value)}" for name, value in line.constants.items()]
    lines += [f"    {call.result} = {_written(call)}" for call in line.calls]
    return "\n".join([*lines, f"    return {line.output}", ""])


def _written(call: Call) -> str:
    parts = [
        text if place < call.positional else f"{name}={text}"
        for place, (name, text) in enumerate(
            (name, _value(value)) for name, value in call.arguments.items()
        )
    ]
    return f"torch.ops.aten.{call.operation}({', '.join(parts)})"


def _value(value: Value) -> str:
    if isinstance(value, Ref):
        return value.name
    if isinstance(value, DType):
        return f"torch.{value.name}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and value == -np.inf:
        # A literal of it is written as a call that the scan refuses.
        return f"torch.ops.aten.log({_shaped('[0.0]', ())})"
    return repr(value)


def _shaped(numbers: str, shape: tuple[int, ...]) -> str:
    """A tensor on the device of the input."""
    flat = f"torch.tensor({numbers}, dtype=torch.float32)"
    # An empty list of sizes is written as a call that the scan refuses.
    made = f"reshape({flat}, {list(shape)})" if shape else f"select({flat}, 0, 0)"
    return f"torch.ops.aten.to(torch.ops.aten.{made}, {INPUT})"


def _constant(value: np.ndarray) -> str:
    """An expression whose value is the constant, bit by bit."""
    numbers = value.astype(np.float32)
    # As in masks of attention; log gives 0 for 1, and -inf for 0.
    absent = np.isneginf(numbers)
    text = _shaped(str(np.where(absent, 0, numbers).ravel().tolist()), value.shape)
    if value.dtype == np.bool_:
        return f"torch.ops.aten.ne({text}, 0)"
    if absent.any():
        kept = _shaped(str((~absent).astype(np.float32).ravel().tolist()), value.shape)
        return f"torch.ops.aten.add({text}, torch.ops.aten.log({kept}))"
    return text

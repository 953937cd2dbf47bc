"""A blueprint and a signature make a graph in which every shape is known."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from esper.contracts import KernelSignature
from esper.errors import BlueprintError, InputError
from esper.tezzeret._blueprint import INPUT, RANKS, RESERVED, BlueprintIR, Kind
from esper.tezzeret._ops import Init, Op, OpError, Shape

_LARGEST_SIZE = 1 << 20
_MOST_PARAMETERS = 1 << 28
_MOST_FLOPS = 1 << 44
"""Per example; a day on one core."""


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a resolved graph."""

    name: str
    """Node and role, such as `down.weight`."""
    shape: Shape
    init: Init
    fan_in: int
    value: float = 1.0
    """What ones are multiplied by."""


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """A node with its sizes and shapes known."""

    op: Op
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    params: dict[str, str]
    """Role (weight, bias) to parameter name."""
    flops: int
    """Per example, forward."""
    multiply_adds: int
    """Of them, those of contractions, counted as pairs."""

    @property
    def name(self) -> str:
        """The node's own."""
        return self.op.name


@dataclasses.dataclass(frozen=True)
class Graph:
    """A blueprint resolved for one signature."""

    signature: KernelSignature
    nodes: tuple[GraphNode, ...]
    parameters: tuple[ParameterSpec, ...]
    output: str

    @property
    def parameter_count(self) -> int:
        """Number of trainable scalars."""
        count = 0
        for spec in self.parameters:
            size = 1
            for axis in spec.shape:
                size *= axis
            count += size
        return count

    @property
    def flops(self) -> int:
        """Floating-point operations per example, forward."""
        return sum(node.flops for node in self.nodes)

    @property
    def multiply_adds(self) -> int:
        """Pairs of a multiplication and an addition in contractions, per example, forward."""
        return sum(node.multiply_adds for node in self.nodes)

    @property
    def mixes_batch(self) -> bool:
        """Whether an example's output depends on the other examples of its batch."""
        return any(node.op.MIXES_BATCH for node in self.nodes)


def resolve(
    blueprint: BlueprintIR, signature: KernelSignature, sizes: Mapping[str, int] | None = None
) -> Graph:
    """Give every node its shape.

    Args:
        sizes: values for some of the blueprint's named sizes.

    Raises:
        InputError: for what is no signature.
        BlueprintError: for an unknown size or one that is none, a signature that the blueprint is
            not for, or shapes that conflict (naming both nodes).
    """
    check_signature(signature)
    table = _sizes(blueprint, signature, dict(sizes or {}))
    shapes: dict[str, Shape] = {INPUT: signature.input_shape}
    nodes: list[GraphNode] = []
    parameters: list[ParameterSpec] = []
    for node in blueprint.nodes:
        where = f"blueprint {blueprint.name!r}, node {node.name!r}"
        sources = tuple(shapes[name] for name in node.inputs)
        op = node.sized(_reader(table, where))
        try:
            outline = op.outline(sources)
        except OpError as error:
            raise BlueprintError(f"{where}: {error}") from error
        if max(outline.shape) > _LARGEST_SIZE:
            raise BlueprintError(
                f"{where}: its output {outline.shape} has an axis longer than {_LARGEST_SIZE}"
            )
        params = {role: f"{node.name}.{role}" for role in outline.params}
        parameters += [
            ParameterSpec(params[role], own.shape, own.init, own.fan_in, own.value)
            for role, own in outline.params.items()
        ]
        shapes[node.name] = outline.shape
        nodes.append(
            GraphNode(op, sources, outline.shape, params, outline.flops, outline.multiply_adds)
        )
    if shapes[blueprint.output] != signature.output_shape:
        raise BlueprintError(
            f"blueprint {blueprint.name!r} does not fit {signature}: its output node"
            f" {blueprint.output!r} gives {shapes[blueprint.output]}, expected"
            f" {signature.output_shape}"
        )
    graph = Graph(signature, tuple(nodes), tuple(parameters), blueprint.output)
    if graph.parameter_count > _MOST_PARAMETERS:
        raise BlueprintError(
            f"blueprint {blueprint.name!r} for {signature} has {graph.parameter_count:,}"
            f" parameters, more than the {_MOST_PARAMETERS:,} that a kernel may have: choose"
            " smaller sizes"
        )
    if graph.flops > _MOST_FLOPS:
        raise BlueprintError(
            f"blueprint {blueprint.name!r} for {signature} takes {graph.flops:,} operations for one"
            f" example, more than the {_MOST_FLOPS:,} that a kernel may take: choose smaller sizes"
        )
    return graph


def check_signature(signature: Any) -> None:
    """Check that it is one, and not its text.

    Raises:
        InputError: saying how to make one.
    """
    if not isinstance(signature, KernelSignature):
        raise InputError(
            f"`signature` must be a KernelSignature, got {signature!r}: make one by"
            " KernelSignature.parse('64->10')"
        )


def kind_of(blueprint: BlueprintIR, signature: KernelSignature) -> Kind:
    """What an example of the signature is to the blueprint.

    Raises:
        BlueprintError: where the blueprint is not for such examples.
    """
    rank = len(signature.input_shape)
    kind: Kind | None = next((k for k in blueprint.takes if RANKS[k] == rank), None)
    if kind is None:
        raise BlueprintError(
            f"blueprint {blueprint.name!r} takes one {' or '.join(blueprint.takes)}"
            f" ({' or '.join(str(RANKS[k]) for k in blueprint.takes)} axes), and the signature"
            f" {signature} has {rank}: choose another blueprint"
        )
    if blueprint.fits == "same" and signature.output_shape != signature.input_shape:
        raise BlueprintError(
            f"blueprint {blueprint.name!r} gives what it takes, one shape, and the signature is"
            f" {signature}: choose another blueprint"
        )
    return kind


def _sizes(
    blueprint: BlueprintIR, signature: KernelSignature, given: dict[str, int]
) -> dict[str, int]:
    """Every size that a node may name."""
    unknown = sorted(str(name) for name in set(given) - set(blueprint.sizes))
    if unknown:
        raise BlueprintError(
            f"blueprint {blueprint.name!r} has no size {', '.join(unknown)}: it has"
            f" {', '.join(blueprint.sizes) or 'none'}"
        )
    for name, size in given.items():
        if type(size) is not int or not 1 <= size <= _LARGEST_SIZE:
            raise BlueprintError(
                f"blueprint {blueprint.name!r}: {name} must be an integer from 1 to"
                f" {_LARGEST_SIZE}, got {size!r}"
            )
    kind = kind_of(blueprint, signature)
    taken, made = signature.input_shape, signature.output_shape
    channels_first = kind in ("signal", "image")
    axis = 0 if channels_first else -1
    own = {"in": taken[axis], "out": made[axis]}
    if len(taken) == 2:
        own["length"] = taken[1] if channels_first else taken[0]
    if channels_first:
        own["stride"] = -(-taken[1] // made[1]) if len(made) > 1 else 1
    return {**blueprint.sizes, **given, **own}


def _reader(table: Mapping[str, int], where: str) -> Callable[[str], int]:
    """Reads `width`, `in*4` and `in/16`."""

    def read(text: str) -> int:
        times, over = text.partition("*"), text.partition("/")
        name = times[0] if times[1] else over[0]
        if name not in table:
            missing = " (this signature gives none)" if name in RESERVED else ""
            raise BlueprintError(
                f"{where}: unknown size {name!r}{missing}; there are {', '.join(table)}"
            )
        size = table[name]
        if times[1]:
            size *= int(times[2])
        elif over[1]:
            size = -(-size // int(over[2]))
        if size > _LARGEST_SIZE:
            raise BlueprintError(f"{where}: {text} is {size}, more than {_LARGEST_SIZE}")
        return size

    return read

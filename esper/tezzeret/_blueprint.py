"""Blueprints: kernels as data, before they are compiled.

A blueprint is a graph of operations whose sizes are numbers or names; given a
signature (what the site takes and gives) it resolves to a `Graph` with every
shape known. Shapes, parameter counts and FLOPs are computed, never declared.
"""

import dataclasses
import difflib
import hashlib
import json
from importlib import resources
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from esper.contracts import KernelSignature, Size
from esper.errors import BlueprintError
from esper.tezzeret._ops import MANY, OPS, Shape

INPUT = "x"
"""The name of the kernel's input in a graph."""

_LARGEST_SIZE = 1 << 20
_MOST_PARAMETERS = 1 << 28

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Node(_Data):
    """One operation of the graph."""

    name: Name
    op: str
    inputs: list[Name] = Field(min_length=1)
    features: Size | Name | None = None
    """Output features of an operation with weights: a number, `in`, `out`, or one of `sizes`."""
    bias: bool = True
    init: Literal["fan_in", "zeros"] = "fan_in"
    """`fan_in`: uniform in ±1/√(input features), biases too; `zeros`: all zero."""


class BlueprintIR(_Data):
    """A kernel as a graph of operations (schema version 1)."""

    schema_version: Literal[1]
    name: Name
    summary: str
    paper: str | None = None
    """Where the architecture comes from."""
    sizes: dict[Name, Size] = Field(default_factory=dict)
    """Named sizes with their defaults; a compilation may give others."""
    birth: Literal["zero", "free"]
    """`zero`: the output is exactly 0 until the first update, so that adding it changes nothing."""
    confidence: float = Field(default=0.5, ge=0.0, le=1.0)
    """Scales the first alpha of a kernel that is not ramped: min(0.6·confidence, 0.5)."""
    nodes: list[Node] = Field(min_length=1)
    output: Name

    @model_validator(mode="after")
    def _check_graph(self) -> Self:
        known = {INPUT}
        for node in self.nodes:
            if node.op not in OPS:
                near = difflib.get_close_matches(node.op, OPS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"node {node.name!r} uses the unknown op {node.op!r}: expected one of"
                    f" {', '.join(OPS)}{hint}"
                )
            if node.name in known:
                raise ValueError(f"two nodes are called {node.name!r}; names must differ")
            for source in node.inputs:
                if source not in known:
                    raise ValueError(
                        f"node {node.name!r} reads {source!r}, which no earlier node makes;"
                        f" before it there are {', '.join(sorted(known))}"
                    )
            op = OPS[node.op]
            wanted = "two or more inputs" if op.arity == MANY else f"{op.arity} input"
            if (len(node.inputs) < 2) if op.arity == MANY else (len(node.inputs) != op.arity):
                raise ValueError(
                    f"node {node.name!r}: {node.op} takes {wanted}, got {len(node.inputs)}"
                )
            if op.has_weights != (node.features is not None):
                verb = "needs" if op.has_weights else "takes no"
                raise ValueError(f"node {node.name!r}: {node.op} {verb} `features`")
            known.add(node.name)
        if self.output not in known - {INPUT}:
            raise ValueError(f"the output {self.output!r} is no node of the graph")
        return self

    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json()).hexdigest()

    def canonical_json(self) -> bytes:
        """The blueprint as bytes that depend on its content alone."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a resolved graph."""

    name: str
    shape: Shape
    init: Literal["fan_in", "zeros"]
    fan_in: int


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """A node with its shapes known."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output_shape: Shape
    params: dict[str, str]
    """Role (weight, bias) to parameter name."""
    flops: int


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


def resolve(
    blueprint: BlueprintIR, signature: KernelSignature, sizes: dict[str, int] | None = None
) -> Graph:
    """Give every node its shape.

    Args:
        sizes: values for some of the blueprint's named sizes.

    Raises:
        BlueprintError: for an unknown size, or shapes that conflict (naming both nodes).
    """
    unknown = set(sizes or {}) - set(blueprint.sizes)
    if unknown:
        raise BlueprintError(
            f"blueprint {blueprint.name!r} has no size {', '.join(sorted(unknown))}: it has"
            f" {', '.join(blueprint.sizes) or 'none'}"
        )
    table = {
        **blueprint.sizes,
        **(sizes or {}),
        "in": signature.input_shape[-1],
        "out": signature.output_shape[-1],
    }
    for name, size in (sizes or {}).items():
        if not 1 <= size <= _LARGEST_SIZE:
            raise BlueprintError(
                f"blueprint {blueprint.name!r}: {name} must be from 1 to {_LARGEST_SIZE}, got"
                f" {size}"
            )
    shapes: dict[str, Shape] = {INPUT: signature.input_shape}
    nodes: list[GraphNode] = []
    parameters: list[ParameterSpec] = []
    for node in blueprint.nodes:
        sources = [shapes[name] for name in node.inputs]
        first = sources[0]
        for name, shape in zip(node.inputs[1:], sources[1:], strict=True):
            if shape != first:
                raise BlueprintError(
                    f"blueprint {blueprint.name!r}, node {node.name!r}: {node.op} needs inputs of"
                    f" one shape, and {node.inputs[0]!r} gives {first} where {name!r} gives {shape}"
                )
        shape, roles = first, {}
        if node.features is not None:
            features = node.features
            if isinstance(features, str):
                if features not in table:
                    raise BlueprintError(
                        f"blueprint {blueprint.name!r}, node {node.name!r}: unknown size"
                        f" {features!r}; there are {', '.join(table)}"
                    )
                features = table[features]
            shape = (*first[:-1], features)
            roles = {"weight": (features, first[-1])} | ({"bias": (features,)} if node.bias else {})
        params = {role: f"{node.name}.{role}" for role in roles}
        parameters += [
            ParameterSpec(params[role], own, node.init, first[-1]) for role, own in roles.items()
        ]
        shapes[node.name] = shape
        flops = OPS[node.op].flops(first, shape)
        nodes.append(GraphNode(node.name, node.op, tuple(node.inputs), shape, params, flops))
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
    return graph


def parse_blueprint(text: str, source: str) -> BlueprintIR:
    """Read a blueprint from YAML or JSON.

    Args:
        source: where the text came from, for messages.

    Raises:
        BlueprintError: naming the source and each thing that is wrong.
    """
    try:
        # Strict mode refuses lists for tuples in Python data but not in JSON.
        return BlueprintIR.model_validate_json(json.dumps(yaml.safe_load(text)))
    except yaml.YAMLError as error:
        raise BlueprintError(f"{source} is not YAML: {error}") from error
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'graph'}: {e['msg']}" for e in error.errors()
        )
        raise BlueprintError(f"{source} is not a blueprint: {details}") from error


_FOLDER = resources.files("esper.tezzeret") / "blueprints"


def blueprint_names() -> list[str]:
    """The names of the blueprints that ship with Esper."""
    return sorted(
        f.name.removesuffix(".yaml") for f in _FOLDER.iterdir() if f.name.endswith("yaml")
    )


def load_blueprint(name: str) -> BlueprintIR:
    """A blueprint of the library.

    Raises:
        BlueprintError: for an unknown name, with the nearest ones.
    """
    names = blueprint_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BlueprintError(f"unknown blueprint {name!r}: there are {', '.join(names)}{hint}")
    return parse_blueprint((_FOLDER / f"{name}.yaml").read_text(), f"blueprint {name!r}")

"""Blueprints: kernels as data, before they are compiled.

A blueprint is a graph of operations whose sizes are numbers or names; given a
signature (what the site takes and gives) it resolves to a `Graph` with every
shape known. Shapes, parameter counts and FLOPs are computed, never declared.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from importlib import resources
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml.composer import ComposerError

from esper.contracts import Size
from esper.errors import BlueprintError
from esper.tezzeret._ops import OPS, AnyOp, Name

_LONGEST_TEXT = 1 << 20
"""Characters of a blueprint's text; those of the library have fewer than 1,000."""

INPUT = "x"
"""The name of the kernel's input in a graph."""

Kind = Literal["vector", "sequence", "signal", "image"]
"""What one example is: `[features]`, `[time, features]`, `[channels, length]`, or
`[channels, height, width]`."""

RANKS: dict[Kind, int] = {"vector": 1, "sequence": 2, "signal": 2, "image": 3}

RESERVED = ("in", "out", "length", "stride")
"""Sizes that a signature gives: features of input and output, positions of a sequence or signal,
and how many times smaller a signal's or an image's output is than its input."""


class BlueprintIR(BaseModel):
    """A kernel as a graph of operations (schema version 2).

    Nodes may stand in any order in a file; here they stand in one in which each reads from
    earlier ones alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[2]
    name: Name
    summary: str
    paper: str | None = None
    """Where the architecture comes from."""
    takes: list[Kind] = Field(default=["vector", "sequence"], min_length=1)
    """What examples it is for."""
    fits: Literal["any", "same"] = "any"
    """`same`: the output has the input's shape; `any`: other features, and strides, too."""
    sizes: dict[Name, Size] = Field(default_factory=dict)
    """Named sizes with their defaults; a compilation may give others."""
    birth: Literal["zero", "identity", "free"]
    """Until the first update, `zero`: the output is exactly 0, so that adding it changes nothing;
    `identity`: it is exactly the input."""
    confidence: float = Field(default=0.5, ge=0.0, le=1.0)
    """Scales the first alpha of a kernel that is not ramped: min(0.6·confidence, 0.5)."""
    nodes: list[AnyOp] = Field(min_length=1, max_length=256)
    output: Name

    @model_validator(mode="before")
    @classmethod
    def _check_data(cls, data: Any) -> Any:
        return _upgraded(_with_known_ops(data)) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check_graph(self) -> Self:
        _check_names(self.nodes, self.sizes)
        if {"sequence", "signal"} <= set(self.takes):
            raise ValueError("`takes` names sequence and signal, which one shape could both be")
        if self.fits == "any" and self.birth == "identity":
            raise ValueError("`birth: identity` needs `fits: same`")
        for node in self.nodes:
            least, most = node.ARITY
            if len(node.inputs) < least or (most is not None and len(node.inputs) > most):
                wanted = {(1, 1): "1 input", (2, None): "two or more inputs"}.get(
                    node.ARITY, f"{least} inputs"
                )
                raise ValueError(
                    f"node {node.name!r}: {node.kind} takes {wanted}, got {len(node.inputs)}"
                )
        if self.output not in {node.name for node in self.nodes}:
            raise ValueError(f"the output {self.output!r} is no node of the graph")
        object.__setattr__(self, "nodes", _in_order(self.nodes))
        read = {source for node in self.nodes for source in node.inputs}
        for node in self.nodes:
            if node.name not in read and node.name != self.output:
                raise ValueError(
                    f"node {node.name!r} is read by no other node and is not the output: remove it"
                )
        if INPUT not in read:
            raise ValueError(f"no node reads the input {INPUT!r}")
        return self

    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json()).hexdigest()

    def canonical_json(self) -> bytes:
        """The blueprint as bytes that depend on its content alone."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()


def _with_known_ops(data: dict[str, Any]) -> dict[str, Any]:
    """Refuse unknown operations here, where the nearest known one can be named."""
    nodes = data.get("nodes")
    for node in nodes if isinstance(nodes, list) else ():
        op = node.get("op") if isinstance(node, dict) else None
        if isinstance(op, str) and op not in OPS:
            near = difflib.get_close_matches(op, OPS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"node {node.get('name')!r} uses the unknown op {op!r}: expected one of"
                f" {', '.join(OPS)}{hint}"
            )
    return data


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A blueprint of schema version 1 as one of version 2.

    There every node carried `features`, `bias` and `init`, whatever its operation.
    """
    nodes = data.get("nodes")
    if data.get("schema_version") != 1 or not isinstance(nodes, list):
        return data

    def upgraded(node: Any) -> Any:
        if not isinstance(node, dict) or node.get("op") == "linear":
            return node
        old = {"features": None, "bias": True, "init": "fan_in"}
        return {k: v for k, v in node.items() if k not in old or v != old[k]}

    return data | {"schema_version": 2, "nodes": [upgraded(node) for node in nodes]}


def _check_names(nodes: Sequence[AnyOp], sizes: dict[str, int]) -> None:
    seen = {INPUT}
    for node in nodes:
        if node.name in seen:
            raise ValueError(f"two nodes are called {node.name!r}; names must differ")
        seen.add(node.name)
    taken = sorted(set(sizes) & set(RESERVED))
    if taken:
        raise ValueError(f"`sizes` names {', '.join(taken)}, which the signature gives")


def _in_order(nodes: Sequence[AnyOp]) -> list[AnyOp]:
    """The nodes, each after those it reads, and otherwise as they were."""
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        for source in node.inputs:
            if source != INPUT and source not in by_name:
                raise ValueError(
                    f"node {node.name!r} reads {source!r}, which no node makes; there are"
                    f" {', '.join((INPUT, *by_name))}"
                )
    try:
        TopologicalSorter({node.name: node.inputs for node in nodes}).prepare()
    except CycleError as error:
        # In the order in which they read each other, the first one repeated at the end.
        cycle = " reads ".join(repr(name) for name in reversed(error.args[1]))
        raise ValueError(f"the graph has a cycle: {cycle}") from error
    ordered: list[AnyOp] = []
    known, waiting = {INPUT}, list(nodes)
    while waiting:
        node = next(node for node in waiting if known.issuperset(node.inputs))
        ordered.append(node)
        known.add(node.name)
        waiting.remove(node)
    return ordered


class _Yaml(yaml.SafeLoader):
    """YAML in which `1e-5` is a number, as in YAML 1.2 and in JSON, and not a text.

    Aliases are refused: a few hundred bytes of them stand for gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ComposerError(
                None, None, f"found the alias *{alias.anchor}: write it out", alias.start_mark
            )
        return super().compose_node(parent, index)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"-?\d+(\.\d*)?[eE][-+]?\d+"), list("-0123456789")
)


def parse_blueprint(text: str, source: str) -> BlueprintIR:
    """Read a blueprint from YAML or JSON.

    Args:
        source: where the text came from, for messages.

    Raises:
        BlueprintError: naming the source and each thing that is wrong.
    """
    if len(text) > _LONGEST_TEXT:
        raise BlueprintError(
            f"{source} is not a blueprint: it has {len(text):,} characters, and a blueprint has at"
            f" most {_LONGEST_TEXT:,}"
        )
    try:
        # Strict mode refuses lists for tuples in Python data but not in JSON.
        data = json.dumps(yaml.load(text, _Yaml))
    except (yaml.YAMLError, RecursionError) as error:
        raise BlueprintError(f"{source} is not YAML that a blueprint may be: {error}") from error
    except Exception as error:  # PyYAML makes values by Python's own types, and lets theirs through
        raise BlueprintError(
            f"{source} is not a blueprint: it holds a value that JSON has not, or that is none of"
            f" its type ({type(error).__name__}: {error}). Write texts, numbers, lists and mappings"
        ) from error
    return read_blueprint(data.encode(), source)


def read_blueprint(canonical: bytes, source: str) -> BlueprintIR:
    """Read what `BlueprintIR.canonical_json` wrote, as artifacts hold it; YAML is refused.

    Args:
        source: where it came from, for messages.

    Raises:
        BlueprintError: naming the source and each thing that is wrong.
    """
    try:
        return BlueprintIR.model_validate_json(canonical)
    except ValidationError as error:
        raise _no_blueprint(source, error) from error


def _no_blueprint(source: str, error: ValidationError) -> BlueprintError:
    details = "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'graph'}: {e['msg']}" for e in error.errors()
    )
    return BlueprintError(f"{source} is not a blueprint: {details}")


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

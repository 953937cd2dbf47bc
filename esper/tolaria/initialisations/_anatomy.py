"""Where a kernel's output is linear in its parameters: its last linear map, found in its graph.

What a kernel computes is run by jax on a CPU, whichever backend trains it, so that both backends
are given the same numbers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.artifacts import Artifact
from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tezzeret import Graph, GraphNode, read_blueprint, resolve

INPUT = "x"
"""What graphs call the kernel's input."""

DENSE = ("linear", "conv1d", "conv2d")
"""Maps of all features at once."""

NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
"""Of which the factors and offsets after the normalisation are a linear map of each feature."""

_MOVES = ("scale", "dropout", "transpose", "reshape")
"""Operations that multiply elements by a constant or move them, and do nothing else."""

_SINGLE = (*_MOVES, "layer_scale")

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Anatomy:
    """A resolved graph cut at its last linear map."""

    graph: Graph
    last: GraphNode
    """Of `DENSE`, or where there is none a map of each feature: `layer_scale` or one of `NORMS`."""
    after: tuple[GraphNode, ...]
    """What follows it, in order: operations that scale and move elements."""

    @property
    def features(self) -> str:
        """The name of what the last map reads."""
        return self.last.op.inputs[0]

    def value(self, name: str, params: Arrays, x: np.ndarray) -> np.ndarray:
        """What a node gives, f32 `[examples, *shape]`."""
        return on_cpu(self._programs.value, name, _float32(params), _f32(x))

    def run(self, params: Arrays, x: np.ndarray) -> np.ndarray:
        """The kernel's output, f32 `[examples, *out]`."""
        return self.value(self.graph.output, params, x)

    def last_alone(self, params: Arrays, features: np.ndarray) -> np.ndarray:
        """What the last map itself gives for its features."""
        return on_cpu(self._programs.last, _float32(params), _f32(features))

    def pull_back(self, params: Arrays, cotangent: np.ndarray) -> np.ndarray:
        """A gradient by the kernel's output, as one by the output of the last map."""
        return on_cpu(self._programs.pull_back, _float32(params), _f32(cotangent))

    def squared_gain(self, params: Arrays) -> np.ndarray:
        """By how much what follows the last map multiplies squares, f32 `[1, *map's output]`."""
        one = np.ones((1, *self.last.output_shape), np.float32)
        return self.pull_back(params, on_cpu(self._programs.after, _float32(params), one))

    @property
    def _programs(self) -> "_Programs":
        return _programs(self)


@dataclasses.dataclass(frozen=True, eq=False)
class _Programs:
    value: Any
    last: Any
    after: Any
    pull_back: Any


@lru_cache(maxsize=64)
def _programs(anatomy: Anatomy) -> _Programs:
    """Jitted once for a graph: kernels that differ in parameters alone share them."""

    def apply(nodes: Sequence[GraphNode], values: dict[str, Any], params: Arrays) -> None:
        for node in nodes:
            values[node.name] = run_node(node, [values[i] for i in node.op.inputs], params)

    def value(name: str, params: Arrays, x: Any) -> Any:
        values: dict[str, Any] = {INPUT: x}
        apply(upstream(anatomy.graph, name), values, params)
        return values[name]

    def last(params: Arrays, features: Any) -> Any:
        return run_node(anatomy.last, [features], params)

    def after(params: Arrays, y: Any) -> Any:
        for node in anatomy.after:
            y = run_node(node, [y], params)
        return y

    def pull_back(params: Arrays, cotangent: Any) -> Any:
        shape = (cotangent.shape[0], *anatomy.last.output_shape)
        _, transposed = jax.vjp(lambda y: after(params, y), jnp.zeros(shape, jnp.float32))
        return transposed(cotangent)[0]

    return _Programs(
        jax.jit(value, static_argnums=0), jax.jit(last), jax.jit(after), jax.jit(pull_back)
    )


def run_node(node: GraphNode, inputs: Sequence[Any], params: Arrays) -> Any:
    """One operation of a graph, on batches."""
    own = {role: params[name] for role, name in node.params.items()}
    return node.op.jax(list(inputs), own)


def upstream(graph: Graph, name: str) -> list[GraphNode]:
    """The nodes that a node's value needs, itself the last."""
    needed = {name}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.op.inputs)
    return [node for node in graph.nodes if node.name in needed]


def on_cpu(function: Any, *arguments: Any) -> np.ndarray:
    """What a function of jax gives on a CPU, whatever other devices there are."""
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(function(*arguments))


def _f32(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


def _float32(params: Arrays) -> dict[str, np.ndarray]:
    return {name: _f32(p) for name, p in params.items()}


def anatomy_of(artifact: Artifact, wanted_by: str) -> Anatomy:
    """The anatomy of an artifact's graph.

    Args:
        wanted_by: the name of the initialisation, for messages.

    Raises:
        InputError: for a kernel without a blueprint, or one whose output is linear in the
            parameters of no one map.
    """
    manifest = artifact.manifest
    if artifact.blueprint is None:
        raise InputError(
            f"initialisation {wanted_by!r} reads a kernel's graph, and kernel"
            f" {artifact.kernel_id[:12]} was made of a {manifest.origin} and has none: take"
            " 'as_compiled', or describe it as a blueprint"
        )
    found = _anatomy(
        artifact.blueprint,
        manifest.signature.model_dump_json(),
        tuple(sorted(manifest.sizes.items())),
    )
    if isinstance(found, str):
        raise InputError(
            f"initialisation {wanted_by!r} needs a kernel whose output is a linear map of features,"
            f" and that of blueprint {manifest.blueprint!r} {found}: take 'as_compiled', or a"
            " blueprint that ends with a linear map, a convolution or a norm"
        )
    return found


@lru_cache(maxsize=64)
def _anatomy(blueprint: bytes, signature: str, sizes: tuple[tuple[str, int], ...]) -> Anatomy | str:
    """The anatomy, or what the output does where there is none."""
    ir = read_blueprint(blueprint, "the artifact's blueprint")
    graph = resolve(ir, KernelSignature.model_validate_json(signature), dict(sizes))
    nodes = {node.name: node for node in graph.nodes}
    after: list[GraphNode] = []
    own_factor: tuple[GraphNode, int] | None = None
    name = graph.output
    while name != INPUT and nodes[name].op.kind in _SINGLE:
        node = nodes[name]
        if own_factor is None and node.op.kind == "layer_scale":
            own_factor = (node, len(after))
        after.append(node)
        name = node.op.inputs[0]
    if name != INPUT and nodes[name].op.kind in DENSE:
        return Anatomy(graph, nodes[name], tuple(reversed(after)))
    if own_factor is not None:
        node, behind = own_factor
        return Anatomy(graph, node, tuple(reversed(after[:behind])))
    if name != INPUT and nodes[name].op.kind in NORMS:
        return Anatomy(graph, nodes[name], tuple(reversed(after)))
    if name == INPUT:
        return "has no parameters of its own"
    return f"comes out of node {name!r}, a {nodes[name].op.kind}"

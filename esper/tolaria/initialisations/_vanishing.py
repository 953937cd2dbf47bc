"""What becomes of a kernel's features when one of its maps is zero."""

import dataclasses
from functools import lru_cache

from esper.errors import InputError
from esper.tezzeret import Graph, GraphNode
from esper.tolaria.initialisations._anatomy import DENSE, INPUT, Anatomy, upstream

SMOOTH_AT_ZERO = ("elu", "gelu", "gelu_tanh", "silu", "tanh")
"""Activations with f(0) = 0 and f'(0) not 0, in both of a kernel's programs."""

_WHY_NOT = {
    "relu": "whose derivative at 0 is 0 in both of its programs, so that nothing behind it would"
    " learn",
    "sigmoid": "which is not 0 at 0",
    "softplus": "which is not 0 at 0",
}
_LINEAR = ("scale", "dropout", "layer_scale", "linear")


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """A hidden map with which the features vanish, and what lies between."""

    hidden: GraphNode
    between: tuple[GraphNode, ...]
    """From the hidden map to the features, in order; all of them are 0 with it."""
    depends_on_input: bool
    """Whether what lies between depends on the input, as products with gates do."""


def find_branch(anatomy: Anatomy, blueprint: str) -> Branch:
    """The map nearest to the last one with which all its features vanish, and are not dead.

    Raises:
        InputError: where there is none.
    """
    found = _find(anatomy)
    if isinstance(found, str):
        raise InputError(
            "initialisation 'gradmax' needs a hidden map that may be zero without being dead, and"
            f" blueprint {blueprint!r} has none: {found}. Take 'zero_output' or 'residual_fit', or"
            " a blueprint with a hidden layer of tanh, ELU, SiLU or GELU"
        )
    return found


@lru_cache(maxsize=64)
def _find(anatomy: Anatomy) -> Branch | str:
    last, graph = anatomy.last, anatomy.graph
    if last.op.kind not in DENSE:
        return f"its last map {last.name!r}, a {last.op.kind}, is one of each feature by itself"
    if groups_of(last) != 1:
        return f"its last map {last.name!r} is a convolution in {groups_of(last)} groups"
    if anatomy.features == INPUT:
        return f"its last map {last.name!r} is its only one"
    reasons: list[str] = []
    for hidden in reversed(upstream(graph, anatomy.features)):
        if hidden.op.kind in DENSE:
            branch = _branch(graph, hidden, last)
            if isinstance(branch, Branch):
                return branch
            reasons.append(branch)
    nothing = f"nothing before its last map {last.name!r} has weights"
    return "; ".join(dict.fromkeys(reasons)) or nothing


def groups_of(node: GraphNode) -> int:
    """In how many groups a dense map has its features."""
    return 1 if node.op.kind == "linear" else int(getattr(node.op, "groups", 1))


def _branch(graph: Graph, hidden: GraphNode, last: GraphNode) -> Branch | str:
    """The branch from a hidden map, or why it is none."""
    features = last.op.inputs[0]
    if groups_of(hidden) != 1:
        return f"node {hidden.name!r} is a convolution in {groups_of(hidden)} groups"
    by_last_axis = {node.op.kind == "linear" for node in (hidden, last)}
    if len(by_last_axis) > 1:
        return f"{hidden.name!r} and its last map {last.name!r} do not map the same axis"
    vanishing = {hidden.name}
    between: list[GraphNode] = []
    dense, gated = False, False
    for node in upstream(graph, features):
        zero = [name in vanishing for name in node.op.inputs]
        kind = node.op.kind
        if node is hidden or not any(zero):
            continue
        if kind in ("add", "residual"):
            if not all(zero):
                return f"node {node.name!r} adds what is not zero with {hidden.name!r}"
        elif kind == "multiply":
            if sum(zero) != 1:
                return f"node {node.name!r} multiplies {hidden.name!r} by itself"
            gated = True
        elif kind == "attention":
            if zero != [False, False, True]:
                return f"node {node.name!r} compares by what {hidden.name!r} gives"
            gated = True
        elif kind == "linear" and hidden.op.kind != "linear":
            return f"node {node.name!r} does not map the axis that {hidden.name!r} does"
        elif kind not in _LINEAR and kind not in SMOOTH_AT_ZERO:
            why = _WHY_NOT.get(kind, f"behind {hidden.name!r}")
            return f"node {node.name!r} is a {kind}, {why}"
        dense |= kind == "linear"
        vanishing.add(node.name)
        between.append(node)
    if features not in vanishing:
        return f"what its last map reads does not vanish with {hidden.name!r}"
    if dense and gated:
        return f"between {hidden.name!r} and the last map are both a gate and another linear map"
    return Branch(hidden, tuple(between), gated)

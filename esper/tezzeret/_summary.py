"""What a blueprint is made of, in a few counts that do not depend on its names or sizes."""

from typing import NamedTuple

from esper.tezzeret._blueprint import INPUT, BlueprintIR
from esper.tezzeret._ops import AnyOp
from esper.tezzeret._ops._traits import TRAITS


class BlueprintSummary(NamedTuple):
    """Counts over a blueprint's nodes."""

    linear: int
    """Linear maps over features: linear layers and convolutions."""
    nonlinear: int
    norms: int
    mixing: int
    """Nodes by which an output position depends on several input positions."""
    gates: int
    """Products of two branches."""
    adds: int
    """Sums of two branches."""
    layers: int
    """Maps with trained parameters on the longest path."""


def summarize_blueprint(blueprint: BlueprintIR) -> BlueprintSummary:
    """The counts of a blueprint. Named sizes are not asked for, and no signature is needed."""
    # Linear layers act on the last axis: positions, in signals and after a transpose.
    turned = {INPUT: "signal" in blueprint.takes}
    path = {INPUT: 0}
    mixing = 0
    for node in blueprint.nodes:
        first = turned[node.inputs[0]]
        turned[node.name] = first != (node.kind == "transpose")
        path[node.name] = max(path[own] for own in node.inputs) + TRAITS[node.kind].layers
        mixing += _mixes(node, over_positions=first)
    traits = [TRAITS[node.kind] for node in blueprint.nodes]
    return BlueprintSummary(
        sum(own.linear for own in traits),
        sum(own.nonlinear for own in traits),
        sum(own.norm for own in traits),
        mixing,
        sum(own.gates for own in traits),
        sum(own.adds for own in traits),
        path[blueprint.output],
    )


def _mixes(node: AnyOp, *, over_positions: bool) -> bool:
    if node.kind == "linear":
        return over_positions
    if node.kind in ("conv1d", "conv2d"):
        return getattr(node, "window", 1) > 1
    return TRAITS[node.kind].mixes

"""Parameters by name: those of the artifact with some of them replaced."""

from collections.abc import Mapping

import numpy as np

from esper.artifacts import Artifact
from esper.tezzeret import GraphNode


def compiled(artifact: Artifact) -> dict[str, np.ndarray]:
    """The artifact's own parameters, copied."""
    return {name: np.array(p) for name, p in artifact.params.items()}


def with_roles(
    params: Mapping[str, np.ndarray], node: GraphNode, roles: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """With a node's parameters replaced, by role and in the dtype that they had."""
    changed = dict(params)
    for role, value in roles.items():
        name = node.params[role]
        with np.errstate(over="ignore"):  # what becomes infinite is refused by name, at the end
            changed[name] = np.asarray(value).astype(changed[name].dtype)
    return changed


def silenced(params: Mapping[str, np.ndarray], node: GraphNode) -> dict[str, np.ndarray]:
    """With all of a node's parameters zero."""
    zeros = {role: np.zeros_like(params[name]) for role, name in node.params.items()}
    return with_roles(params, node, zeros)

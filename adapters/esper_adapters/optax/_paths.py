"""Where a leaf is, whatever graft lies around it.

A graft puts a node in a layer's place and the layer itself one step deeper,
under `HOST_FIELD`. A **canonical path** leaves those steps out, so a host's
parameter has the same one before and after: `.layers[0].weight` and
`.layers[0].esper_host.weight` are both `("layers", 0, "weight")`. Entries are
compared by their name, key or index, not by the kind of node they lead through.
"""

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey, keystr

from esper_adapters._naming import HOST_FIELD
from esper_adapters.optax._errors import OptimizerSurgeryError

CanonicalPath = tuple[Hashable, ...]


class Leaf(NamedTuple):
    """A leaf and its full path."""

    path: KeyPath
    value: Any

    @property
    def name(self) -> str:
        """The path as jax writes it, `.` for the root."""
        return keystr(self.path) or "."

    @property
    def aval(self) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype."""
        if isinstance(self.value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            return tuple(self.value.shape), self.value.dtype
        return jnp.shape(self.value), jnp.result_type(self.value)


Leaves = dict[CanonicalPath, Leaf]


def canonical(path: KeyPath) -> CanonicalPath:
    """The canonical path of a leaf or node."""
    return tuple(
        entry
        for key, entry in ((key, _meaning(key)) for key in path)
        if not (isinstance(key, GetAttrKey | DictKey) and entry == HOST_FIELD)
    )


def _meaning(key: Any) -> Hashable:
    match key:
        case GetAttrKey(name=entry) | DictKey(key=entry) | FlattenedIndexKey(key=entry):
            return entry
        case SequenceKey(idx=entry):
            return entry
        case _:
            return key


def by_path(tree: Any, what: str) -> Leaves:
    """The leaves of `tree` by canonical path; `what` names the tree in errors.

    Raises:
        OptimizerSurgeryError: where two leaves have the same canonical path.
    """
    found: Leaves = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        leaf = Leaf(path, value)
        other = found.setdefault(canonical(path), leaf)
        if other is not leaf:
            raise OptimizerSurgeryError(
                f"two leaves of {what} are one and the same once steps named {HOST_FIELD!r} are"
                f" left out: {other.name} and {leaf.name}; give one of them another name"
            )
    return found


def without(tree: Any, paths: Collection[CanonicalPath]) -> Any:
    """The tree with optax.MaskedNode in the place of the leaves at these canonical paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: optax.MaskedNode() if canonical(path) in paths else leaf, tree
    )


def listed(leaves: Leaves, paths: Collection[CanonicalPath]) -> str:
    """Up to four of these leaves by name, for an error."""
    names = [leaf.name for path, leaf in leaves.items() if path in paths]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def state_classes(state: Any, path: KeyPath) -> str:
    """The classes of the transformations' states on the way to a leaf, outermost first."""
    names: list[str] = []
    node = state
    for key in path:
        # States are named tuples; plain tuples are those of `optax.chain`.
        if isinstance(node, tuple) and type(node) is not tuple:
            names.append(type(node).__name__)
        children = jax.tree_util.tree_leaves_with_path(
            node, is_leaf=lambda n, top=node: n is not top
        )
        node = next((child for child_path, child in children if child_path[:1] == (key,)), None)
    return " / ".join(names) or type(state).__name__

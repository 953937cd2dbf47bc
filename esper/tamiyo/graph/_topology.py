"""A model as its controller sees it: sites, and which of them feeds which."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from esper.errors import InputError

KINDS = ("linear", "convolution", "attention", "recurrent", "embedding", "norm", "other")
"""What a layer may be."""

_PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "recurrent": ("lstm", "gru", "rnn"),
    "embedding": ("embed",),
    "norm": ("norm",),
    "convolution": ("conv",),
    "linear": ("linear", "dense", "einsum"),
}
"""By kind, what the names of such classes contain, in the frameworks that have them."""


def kind_of(layer: type) -> str:
    """One of `KINDS`, by the names of a layer's class and of those that it is derived from."""
    for base in layer.__mro__:
        name = base.__name__.lower()
        for kind, parts in _PARTS.items():
            if any(part in name for part in parts):
                return kind
    return "other"


@dataclasses.dataclass(frozen=True)
class Flow:
    """How data flows between the sites of a model, as one pass through it shows."""

    order: tuple[int, ...]
    """Rows of the sites that were called, by when each was done for the first time."""
    edges: frozenset[tuple[int, int]]
    """(from, to): what the one returned reached the other without a site between them. A layer
    that is called again on what it returned has an edge to itself."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A site."""

    name: str
    kind: str
    """One of `KINDS`."""
    inputs: tuple[int, ...]
    """Shape of what it takes for one example; () where that is not known."""
    outputs: tuple[int, ...]
    parameters: int
    """Of the host's layer alone."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """The sites of a model by row, and the data flow between them. Grafts do not change it."""

    nodes: tuple[Node, ...]
    senders: np.ndarray
    """i32 `[edges]`: rows, sorted, as pairs with `receivers`; no node is its own."""
    receivers: np.ndarray
    """i32 `[edges]`."""
    depths: np.ndarray
    """i32 `[nodes]`: sites before this one on the longest way to it, in the order of the pass."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of all sites, by row."""
        return tuple(node.name for node in self.nodes)


def make_topology(nodes: Sequence[Node], flow: Flow) -> Topology:
    """The topology of a model whose sites are `nodes` by row.

    Raises:
        InputError: for a model without sites, about which there is nothing to decide.
        ValueError: for a flow between rows that are not there.
    """
    if not nodes:
        raise InputError(
            "a model graph needs one site at least, and this model has none: give one of its layers"
            " seeds, as wrap does"
        )
    rows = {row for edge in flow.edges for row in edge} | set(flow.order)
    if not rows <= set(range(len(nodes))):
        raise ValueError(
            f"the flow names rows {sorted(rows - set(range(len(nodes))))}, and there are"
            f" {len(nodes)} sites"
        )
    edges = sorted(edge for edge in flow.edges if edge[0] != edge[1])
    pairs = np.array(edges, np.int32).reshape(-1, 2)
    return Topology(
        tuple(nodes), pairs[:, 0].copy(), pairs[:, 1].copy(), _depths(len(nodes), flow.order, edges)
    )


def _depths(count: int, order: Iterable[int], edges: Collection[tuple[int, int]]) -> np.ndarray:
    before: dict[int, list[int]] = {}
    for sender, receiver in edges:
        before.setdefault(receiver, []).append(sender)
    depths = np.zeros(count, np.int32)
    done: set[int] = set()
    for row in order:
        # What comes back from a later call, as in a loop, is no way to the first one.
        depths[row] = max(
            (depths[own] + 1 for own in before.get(row, ()) if own in done), default=0
        )
        done.add(row)
    return depths

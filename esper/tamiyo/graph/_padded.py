"""A topology with room to spare, so that models of about one size share a program."""

from typing import NamedTuple

import numpy as np

from esper.tamiyo.graph._topology import Topology

LEAST_NODES = 8
MOST_SLOTS = 8
FORWARD, BACKWARD = 0, 1
"""Kinds of edges: along the data flow, and against it, as gradients go."""


class Edges(NamedTuple):
    """The edges of a graph in both directions, and which nodes there are.

    Most nodes of a network have few neighbours. The first of each node lie in slots, over which
    compilers make loops without a scatter; what the slots have no room for is a list.
    """

    slots: np.ndarray
    """i32 `[slots, nodes]`: from which node an edge comes to this one."""
    slot_kinds: np.ndarray
    """i32 `[slots, nodes]`: FORWARD or BACKWARD."""
    taken: np.ndarray
    """bool `[slots, nodes]`: False for slots without an edge."""
    senders: np.ndarray
    """i32 `[more]`: of the edges that are in no slot."""
    receivers: np.ndarray
    """i32 `[more]`, ascending; past the last node for edges that only fill up."""
    kinds: np.ndarray
    """i32 `[more]`."""
    there: np.ndarray
    """bool `[nodes]`: False for nodes that only fill up."""

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Nodes, slots, and edges in the list: what decides over the program."""
        return len(self.there), len(self.slots), len(self.senders)


def bucket(count: int, least: int = LEAST_NODES) -> int:
    """The next size up: powers of two times `least`, and one and a half of those.

    Less than half of a bucket is empty, but for the smallest.
    """
    size, half = least, False
    while size < count:
        size, half = (size * 4 // 3, False) if half else (size * 3 // 2, True)
    return size


def pad_topology(
    topology: Topology,
    *,
    nodes: int | None = None,
    slots: int | None = None,
    more: int | None = None,
) -> Edges:
    """The edges of a model, filled up to buckets.

    Args:
        nodes: how many there are to be; None for their `bucket`.
        slots: of each node; None for a power of two, as many as any node needs or `MOST_SLOTS`.
        more: edges in the list; None for their `bucket`, or none where there are none.

    Raises:
        ValueError: where there are more than that.
    """
    count = len(topology.nodes)
    senders = np.concatenate([topology.senders, topology.receivers])
    receivers = np.concatenate([topology.receivers, topology.senders])
    kinds = np.repeat([FORWARD, BACKWARD], len(topology.senders)).astype(np.int32)
    order = np.argsort(receivers, kind="stable")
    senders, receivers, kinds = senders[order], receivers[order], kinds[order]
    # The place of each edge among those of its receiver.
    places = np.arange(len(receivers)) - np.searchsorted(receivers, receivers)
    if slots is None:
        slots = min(bucket_of_slots(int(places.max(initial=-1)) + 1), MOST_SLOTS)
    within = places < slots
    left = int((~within).sum())
    nodes = bucket(count) if nodes is None else nodes
    more = (bucket(left) if left else 0) if more is None else more
    if count > nodes or left > more:
        raise ValueError(
            f"a model of {count} sites with {left} edges beyond {slots} slots does not fit into"
            f" {nodes} nodes and {more} edges"
        )
    own = Edges(
        np.zeros((slots, nodes), np.int32),
        np.zeros((slots, nodes), np.int32),
        np.zeros((slots, nodes), np.bool_),
        np.zeros(more, np.int32),
        np.full(more, nodes, np.int32),
        np.zeros(more, np.int32),
        np.arange(nodes) < count,
    )
    at = places[within], receivers[within]
    own.slots[at], own.slot_kinds[at], own.taken[at] = senders[within], kinds[within], True
    own.senders[:left], own.receivers[:left] = senders[~within], receivers[~within]
    own.kinds[:left] = kinds[~within]
    return own


def bucket_of_slots(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()

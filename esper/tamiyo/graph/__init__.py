"""The model graph: what a controller that learns sees of a network."""

from esper.tamiyo.graph._padded import BACKWARD, FORWARD, Edges, bucket, pad_topology
from esper.tamiyo.graph._topology import KINDS, Flow, Node, Topology, kind_of, make_topology

__all__ = [
    "BACKWARD",
    "FORWARD",
    "KINDS",
    "Edges",
    "Flow",
    "Node",
    "Topology",
    "bucket",
    "kind_of",
    "make_topology",
    "pad_topology",
]

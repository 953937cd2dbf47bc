"""The model graph: what a controller that learns sees of a network."""

from esper.tamiyo.graph._topology import KINDS, Flow, Node, Topology, kind_of, make_topology

__all__ = ["KINDS", "Flow", "Node", "Topology", "kind_of", "make_topology"]

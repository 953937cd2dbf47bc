"""The model graph: what a controller that learns sees of a network."""

from esper.tamiyo.graph._cost_columns import COSTS, cost_columns
from esper.tamiyo.graph._describe import (
    KERNEL_FEATURES,
    OPERATIONS,
    describe_costs,
    describe_kernel,
    describe_operations,
)
from esper.tamiyo.graph._features import (
    BOUND,
    NODE,
    NODE_FEATURES,
    RUN,
    RUN_FEATURES,
    SEED,
    SEED_FEATURES,
    Held,
    Legal,
    ModelGraph,
    legal_choices,
    model_graph,
)
from esper.tamiyo.graph._follows import FOLLOWED, MOST_ROWS, follows
from esper.tamiyo.graph._listed import list_seeds
from esper.tamiyo.graph._padded import BACKWARD, FORWARD, Edges, bucket, pad_topology
from esper.tamiyo.graph._readings import KERNEL, PAST, Readings
from esper.tamiyo.graph._topology import KINDS, Flow, Node, Topology, kind_of, make_topology

__all__ = [
    "BACKWARD",
    "BOUND",
    "COSTS",
    "FOLLOWED",
    "FORWARD",
    "KERNEL",
    "KERNEL_FEATURES",
    "KINDS",
    "MOST_ROWS",
    "NODE",
    "NODE_FEATURES",
    "OPERATIONS",
    "PAST",
    "RUN",
    "RUN_FEATURES",
    "SEED",
    "SEED_FEATURES",
    "Edges",
    "Flow",
    "Held",
    "Legal",
    "ModelGraph",
    "Node",
    "Readings",
    "Topology",
    "bucket",
    "cost_columns",
    "describe_costs",
    "describe_kernel",
    "describe_operations",
    "follows",
    "kind_of",
    "legal_choices",
    "list_seeds",
    "make_topology",
    "model_graph",
    "pad_topology",
]

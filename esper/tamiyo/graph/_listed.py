"""Seeds that hold something as a list, since in a large network most do not."""

import numpy as np

from esper.tamiyo.graph._features import SEED, Held, ModelGraph
from esper_functional import SeedLifecycleState

_LEAST = 512
"""Seeds of a network, to which it is not worth a program of its own."""

_SHARES = (8, 4, 2)
"""Lists have room for an eighth, a fourth or a half of all seeds."""

_COLUMNS = 4
"""Rows are filled up with 0 to a multiple of it: products over them are faster."""


def list_seeds(graph: ModelGraph) -> ModelGraph:
    """The same graph, its seeds a list in which all that hold nothing are one row.

    A policy finds the same but for rounding, and computes less. Lists are filled up to few
    sizes, so that a network that grows compiles at most three programs more.

    Args:
        graph: of numpy, without leading axes, its seeds by node.

    Returns:
        The graph itself where a list would be no shorter, or the network is small.
    """
    nodes, each, _ = graph.seeds.shape
    empty = np.zeros(SEED, np.float32)
    empty[int(SeedLifecycleState.DORMANT)] = 1.0
    seeds = graph.seeds.reshape(-1, SEED)
    told = (seeds != empty).any(axis=1) & np.repeat(graph.edges.there, each)
    places = np.flatnonzero(told)
    sizes = [nodes * each // share for share in _SHARES]
    fitting = [size for size in sizes if size > len(places)]
    if nodes * each <= _LEAST or not fitting:
        return graph
    features = np.zeros((fitting[0], -(-SEED // _COLUMNS) * _COLUMNS), np.float32)
    features[: len(places), :SEED] = seeds[places]
    features[len(places) :, :SEED] = empty
    node = np.zeros(len(features), np.int32)
    node[: len(places)] = places // each
    at = np.full(nodes * each, len(features) - 1, np.int32)
    at[places] = np.arange(len(places))
    return graph._replace(seeds=features, held=Held(at.reshape(nodes, each), node))

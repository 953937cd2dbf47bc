"""Model graphs for tests: readings of made-up networks, of any size."""

import numpy as np

from esper.tamiyo.graph import (
    KERNEL,
    PAST,
    Edges,
    Flow,
    Node,
    Readings,
    make_topology,
    model_graph,
    pad_topology,
)


def chain(count, extra=()):
    """A topology of linear sites, each feeding the next, and `extra` edges."""
    nodes = [Node(f"layers.{i}", "linear", (8,), (8,), 72) for i in range(count)]
    edges = {(i, i + 1) for i in range(count - 1)} | set(extra)
    return make_topology(nodes, Flow(tuple(range(count)), frozenset(edges)))


def drawn_readings(random, nodes, seeds=2, kernels=3, there=None):
    """Readings of a network in any state, with some of them unknown."""

    def values(*shape, low=0.0, high=1.0):
        return random.uniform(low, high, shape).astype(np.float32)

    def some_nan(array):
        return np.where(random.random(array.shape) < 0.3, np.float32(np.nan), array)

    stage = random.choice([0, 0, 1, 2, 2, 3, 4], (nodes, seeds)).astype(np.uint8)
    held = (stage == 2) | (stage == 4) | (stage == 1)
    readings = Readings(
        progress=values(),
        train_loss=some_nan(values(PAST)),
        validation_loss=np.concatenate([values(1), some_nan(values(PAST - 1))]),
        validation_accuracy=values(),
        first_loss=values() + np.float32(0.5),
        loss_spread=values(),
        rollbacks=np.float32(1.0),
        parameters=values(low=1.0, high=3.0),
        flops=values(low=1.0, high=3.0),
        kind=np.zeros(nodes, np.int32),
        sizes=values(nodes, 3, high=100.0),
        depth=np.arange(nodes, dtype=np.float32),
        grows=random.random(nodes) < 0.7,
        gradient_norm=some_nan(values(nodes)),
        weight_norm=values(nodes),
        follows=some_nan(values(nodes, 2, low=-1.0)),
        stage=stage,
        alpha=values(nodes, seeds),
        health=some_nan(values(nodes, seeds)),
        health_before=some_nan(values(nodes, seeds)),
        worth=some_nan(values(nodes, seeds, low=-1.0)),
        worth_half=some_nan(values(nodes, seeds)),
        age=np.where(held, 3.0, 0.0).astype(np.float32),
        held=np.where(held[..., None], values(nodes, seeds, KERNEL), 0.0).astype(np.float32),
        kernels=values(kernels, KERNEL),
        fits=random.random((nodes, kernels)) < 0.8,
    )
    if there is None:
        return readings
    rows = {"kind", "sizes", "depth", "grows", "gradient_norm", "weight_norm", "follows", "stage",
            "alpha",
            "health", "health_before", "worth", "worth_half", "age", "held", "fits"}  # fmt: skip
    return readings._replace(
        **{
            name: np.where(there.reshape(-1, *[1] * (own.ndim - 1)), own, np.zeros_like(own))
            for name, own in readings._asdict().items()
            if name in rows
        }
    )


def drawn_graph(seed, count=5, nodes=8, seeds=2, kernels=3, extra=()):
    """A model graph of `count` sites among `nodes`."""
    random = np.random.default_rng(seed)
    edges = pad_topology(chain(count, extra), nodes=nodes, slots=4, more=0)
    return model_graph(
        drawn_readings(random, nodes, seeds, kernels, np.asarray(edges.there)), edges, np
    )


def reordered(readings: Readings, order):
    """The readings with nodes in another order: row i is what row order[i] was."""
    rows = {"kind", "sizes", "depth", "grows", "gradient_norm", "weight_norm", "follows", "stage",
            "alpha",
            "health", "health_before", "worth", "worth_half", "age", "held", "fits"}  # fmt: skip
    return readings._replace(**{name: getattr(readings, name)[order] for name in rows})


def reordered_edges(edges: Edges, order):
    """The edges with nodes in another order."""
    place = np.argsort(order).astype(np.int32)
    return edges._replace(
        slots=np.where(edges.taken, place[edges.slots], 0)[:, order],
        slot_kinds=edges.slot_kinds[:, order],
        taken=edges.taken[:, order],
        there=edges.there[order],
    )

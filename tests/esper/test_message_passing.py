"""Message passing: what is written by hand, in any order of the nodes, with any filling up."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.tamiyo.graph import (
    BACKWARD,
    FORWARD,
    Flow,
    Node,
    bucket,
    make_topology,
    pad_topology,
)
from esper.tamiyo.policy import GraphAttention, MessagePassing
from tests.tolerance import assert_close


def topology(nodes, pairs):
    flow = Flow(tuple(range(nodes)), frozenset(pairs))
    return make_topology([Node(f"n{i}", "linear", (2,), (2,), 6) for i in range(nodes)], flow)


@st.composite
def graphs(draw, most=7):
    nodes = draw(st.integers(1, most))
    rows = st.integers(0, nodes - 1)
    pairs = draw(st.sets(st.tuples(rows, rows), max_size=12))
    return topology(nodes, {(a, b) for a, b in pairs if a != b})


def listed(edges):
    """All edges: from, to, and their kind."""
    slot, to = np.nonzero(edges.taken)
    senders = np.concatenate([edges.slots[slot, to], edges.senders])
    receivers = np.concatenate([to, edges.receivers])
    kinds = np.concatenate([edges.slot_kinds[slot, to], edges.kinds])
    rows = zip(senders.tolist(), receivers.tolist(), kinds.tolist(), strict=True)
    return [row for row in rows if row[1] < len(edges.there)]


SLOTS = st.sampled_from([1, 2, 16])


def padded(own, slots, nodes=8, more=24):
    return pad_topology(own, nodes=nodes, slots=slots, more=more)


@given(graphs(), SLOTS)
def test_padded_edges_are_those_of_the_topology_in_both_directions(own, slots):
    edges = padded(own, slots)
    found = listed(edges)
    pairs = set(zip(own.senders.tolist(), own.receivers.tolist(), strict=True))
    assert len(found) == 2 * len(pairs)
    assert set(found) == {(a, b, FORWARD) for a, b in pairs} | {(b, a, BACKWARD) for a, b in pairs}
    assert (np.diff(edges.receivers) >= 0).all()
    assert edges.there.tolist() == [i < len(own.nodes) for i in range(8)]
    assert edges.bucket == (8, slots, 24)


def test_buckets():
    assert [bucket(n) for n in (0, 8, 9, 12, 13, 16, 17, 1000, 5000)] == [
        8, 8, 12, 12, 16, 16, 24, 1024, 6144,
    ]  # fmt: skip
    for n in range(9, 3000):
        assert n <= bucket(n) < 1.5 * n + 1
    chain = topology(3, {(0, 1), (1, 2)})
    assert pad_topology(chain).bucket == (8, 2, 0)
    assert pad_topology(topology(1, set())).bucket == (8, 1, 0)
    star = topology(14, {(0, i) for i in range(1, 14)})
    assert pad_topology(star).bucket == (16, 8, 8)
    with pytest.raises(ValueError, match="3 sites with 1 edges beyond 1 slots does not fit into 8"):
        pad_topology(chain, slots=1, more=0)


def by_hand(layer, x, edges):
    """Node by node, in numpy."""
    heads, channels = layer.of_sender.shape
    v = np.asarray(x @ layer.values).reshape(len(x), heads, channels)
    out = np.asarray(x @ layer.own + layer.bias).reshape(len(x), heads, channels).copy()
    for i in range(len(x)):
        incoming = [(a, kind) for a, b, kind in listed(edges) if b == i]
        if not incoming:
            continue
        for h in range(heads):
            raw = np.array(
                [
                    v[j, h] @ np.asarray(layer.of_sender[h])
                    + v[i, h] @ np.asarray(layer.of_receiver[h])
                    + float(layer.of_kind[kind, h])
                    for j, kind in incoming
                ]
            )
            score = np.where(raw > 0, raw, 0.2 * raw)
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            out[i, h] += sum(w * v[j, h] for w, (j, _) in zip(weight, incoming, strict=True))
    return out.reshape(len(x), -1)


def layer_of(key=0, inputs=5, outputs=6):
    layer = GraphAttention(inputs, outputs, heads=2, kinds=2, key=jax.random.key(key))
    return eqx.tree_at(lambda own: own.of_kind, layer, jnp.array([[0.3, -1.0], [2.0, 0.1]]))


@given(graphs(), SLOTS, st.integers(0, 5))
def test_a_round_is_what_is_written_by_hand(own, slots, seed):
    edges = padded(own, slots)
    x = jax.random.normal(jax.random.key(seed), (8, 5))
    layer = layer_of(seed)
    assert_close(ROUND(layer, x, edges), by_hand(layer, x, edges))


def network(features=5):
    return MessagePassing(features, 8, rounds=3, heads=2, kinds=2, key=jax.random.key(1))


ROUND = eqx.filter_jit(lambda layer, x, edges: layer(x, edges))
NET = network()


@given(graphs(), SLOTS, st.permutations(range(7)))
def test_the_order_of_nodes_is_of_no_matter(own, slots, order):
    count = len(own.nodes)
    order = [i for i in order if i < count]
    place = {row: at for at, row in enumerate(order)}
    pairs = zip(own.senders.tolist(), own.receivers.tolist(), strict=True)
    other = topology(count, {(place[a], place[b]) for a, b in pairs})
    x = np.asarray(jax.random.normal(jax.random.key(0), (8, 5)))
    moved = x.copy()
    moved[:count] = x[order]
    ours, theirs = ROUND(NET, x, padded(own, slots)), ROUND(NET, moved, padded(other, slots))
    assert_close(theirs[:count], ours[np.array(order)])


@given(graphs(), SLOTS)
def test_filling_up_is_of_no_matter(own, slots):
    count = len(own.nodes)
    x = np.array(jax.random.normal(jax.random.key(0), (12, 5)))
    small, large = padded(own, slots), padded(own, 4, nodes=12, more=48)
    ours, theirs = ROUND(NET, x[:8], small), ROUND(NET, x, large)
    assert_close(theirs[:count], ours[:count])
    assert not np.asarray(theirs[count:]).any()
    # Whatever lies in nodes that are not there, even what is not finite.
    x[count:] = np.nan
    np.testing.assert_array_equal(ROUND(NET, x, large)[:count], theirs[:count])


def test_models_of_one_bucket_compile_once():
    compiled = []

    @jax.jit
    def run(net, x, edges):
        compiled.append(x.shape)
        return net(x, edges)

    for nodes in (9, 10, 12):
        own = topology(nodes, {(i, i + 1) for i in range(nodes - 1)})
        edges = pad_topology(own)
        run(NET, jnp.ones((len(edges.there), 5)), edges)
    assert compiled == [(12, 5)]


@pytest.mark.parametrize("slots", [1, 4])
def test_gradients_are_those_of_differences_and_finite_without_edges(slots):
    edges = padded(topology(4, {(0, 1), (2, 1)}), slots, nodes=4)
    x = jax.random.normal(jax.random.key(3), (4, 5))

    def loss(net):
        return jnp.sum(net(x, edges) ** 2)

    net = NET
    gradient = jax.grad(loss)(net)
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert sum(float(jnp.abs(leaf).sum() > 0) for leaf in leaves) >= len(leaves) - 1
    along = jax.tree.map(lambda leaf: jnp.sign(leaf), gradient)

    def moved(t):
        return float(loss(jax.tree.map(lambda p, d: p + t * d, net, along)))

    slope = sum(float(jnp.sum(g * d)) for g, d in zip(leaves, jax.tree.leaves(along), strict=True))
    assert (moved(1e-3) - moved(-1e-3)) / 2e-3 == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("slots", [1, 4])
def test_scores_of_any_size_are_weighed(slots):
    edges = padded(topology(3, {(0, 2), (1, 2)}), slots, nodes=4)
    layer = layer_of()
    x = 1e4 * jax.random.normal(jax.random.key(3), (4, 5))
    assert_close(layer(x, edges), by_hand(layer, x, edges))


def test_heads_share_the_outputs():
    with pytest.raises(ValueError, match="3 heads cannot share 8 outputs equally"):
        GraphAttention(4, 8, heads=3, kinds=1, key=jax.random.key(0))

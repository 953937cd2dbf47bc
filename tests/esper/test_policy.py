"""What a policy sees, what it may choose, and that neither depends on how a graph is written."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.tamiyo.graph import (
    BOUND,
    NODE,
    NODE_FEATURES,
    RUN,
    RUN_FEATURES,
    SEED,
    model_graph,
    pad_topology,
)
from esper.tamiyo.policy import (
    ALPHAS,
    MASKED,
    Choice,
    Kind,
    best,
    entropies,
    log_prob,
    make_policy,
    sample,
)
from esper.tamiyo.policy._message_passing import _normalised
from esper_functional import SeedLifecycleState
from tests.esper.model_graphs import (
    chain,
    drawn_graph,
    drawn_readings,
    reordered,
    reordered_edges,
)

POLICY = make_policy(jax.random.key(0), width=16, rounds=2, heads=2)
# First logits are all but uniform; these are not.
SHARP = jax.tree.map(lambda leaf: leaf * 3.0 if eqx.is_array(leaf) else leaf, POLICY)
ASKED = eqx.filter_jit(SHARP)


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(6))
def test_features_are_the_same_on_numpy_and_jax_and_all_are_bounded(seed):
    random = np.random.default_rng(seed)
    edges = pad_topology(chain(5), nodes=8)
    readings = drawn_readings(random, 8, there=edges.there)
    on_numpy = model_graph(readings, edges, np)
    on_jax = jax.jit(lambda own: model_graph(own, edges, jnp))(readings)
    for found, expected in zip(on_jax[:4], on_numpy[:4], strict=True):
        assert expected.dtype == np.float32
        assert np.isfinite(expected).all()
        assert np.abs(expected).max() <= BOUND
        close(found, expected)
    jax.tree.map(np.testing.assert_array_equal, on_jax.legal, on_numpy.legal)
    shapes = [on_numpy.run.shape, on_numpy.nodes.shape, on_numpy.seeds.shape]
    assert shapes == [(RUN,), (8, NODE), (8, 2, SEED)]
    assert not on_numpy.nodes[5:].any()


def test_features_by_hand():
    random = np.random.default_rng(3)
    edges = pad_topology(chain(8), nodes=8)
    readings = drawn_readings(random, 8)._replace(
        progress=np.float32(0.25),
        train_loss=np.array([0.5, 1.0, np.nan, np.nan], np.float32),
        validation_loss=np.array([0.25, 0.5, np.nan, np.nan], np.float32),
        first_loss=np.float32(1.0),
        parameters=np.float32(np.e),
        gradient_norm=np.full(8, np.e, np.float32),
    )
    run = dict(zip(RUN_FEATURES, model_graph(readings, edges, np).run.tolist(), strict=True))
    log2 = float(np.log(2.0))
    expected = {
        "progress": 0.25, "train_loss": -log2, "validation_loss": -2 * log2, "gap": -log2,
        "loss_level": -log2 / 2, "train_fall": -log2, "validation_fall": -log2, "has_past": 1.0,
        "has_long_past": 0.0, "train_falls": 0.0, "validation_falls": 0.0, "parameters": 1.0,
    }  # fmt: skip
    for name, value in expected.items():
        assert run[name] == pytest.approx(value, abs=1e-6), name
    node = dict(zip(NODE_FEATURES, model_graph(readings, edges, np).nodes[2].tolist(), strict=True))
    assert node["is_linear"] == 1.0
    assert node["gradient_norm"] == pytest.approx(0.25)
    assert node["relative_gradient"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_legal_is_the_lifecycles(seed):
    random = np.random.default_rng(seed)
    edges = pad_topology(chain(5), nodes=8)
    readings = drawn_readings(random, 8, there=edges.there)
    legal = model_graph(readings, edges, np).legal
    for node in range(8):
        stages = readings.stage[node]
        free = [s for s in range(2) if stages[s] == SeedLifecycleState.DORMANT and node < 5]
        assert legal.free[node] == (free[0] if free else -1)
        for kernel in range(3):
            may = bool(free) and readings.grows[node] and readings.fits[node, kernel]
            assert legal.graft[node, kernel] == may
        for seed_ in range(2):
            active = stages[seed_] == SeedLifecycleState.ACTIVE and node < 5
            assert legal.unload[node, seed_] == legal.fossilize[node, seed_] == active
            assert legal.retarget[node, seed_] == active


def every_choice(graph):
    legal = graph.legal
    nodes, seeds = legal.unload.shape
    yield Choice(Kind.WAIT, 0, 0, 0, 0), True
    for node, kernel in itertools.product(range(nodes), range(legal.graft.shape[1])):
        yield Choice(Kind.GRAFT, node, 0, kernel, 0), bool(legal.graft[node, kernel])
    for node, seed in itertools.product(range(nodes), range(seeds)):
        yield Choice(Kind.UNLOAD, node, seed, 0, 0), bool(legal.unload[node, seed])
        yield Choice(Kind.FOSSILIZE, node, seed, 0, 0), bool(legal.fossilize[node, seed])
        for alpha in range(len(ALPHAS)):
            yield Choice(Kind.RETARGET, node, seed, 0, alpha), bool(legal.retarget[node, seed])


@pytest.mark.parametrize("seed", range(4))
def test_probabilities_are_those_of_all_legal_choices_and_entropies_are_theirs(seed):
    graph = drawn_graph(seed)
    logits, _ = ASKED(graph)
    choices, legal = zip(*every_choice(graph), strict=True)
    stacked = Choice(*(np.array(column, np.int32) for column in zip(*choices, strict=True)))
    logs = np.asarray(jax.vmap(lambda own: log_prob(logits, own))(stacked), np.float64)
    legal = np.array(legal)
    assert (logs[~legal] < MASKED / 2).all()
    assert np.exp(logs[legal]).sum() == pytest.approx(1.0, abs=1e-5)
    parts = entropies(logits)
    expected = -(np.exp(logs[legal]) * logs[legal]).sum()
    assert sum(map(float, parts.values())) == pytest.approx(expected, abs=1e-4)
    assert set(parts) == {"kind", "site", "kernel", "seed", "alpha"}


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_is_legal_and_as_frequent_as_it_is_likely(seed):
    graph = drawn_graph(seed)
    logits, _ = ASKED(graph)
    keys = jax.random.split(jax.random.key(seed), 4_000)
    drawn = jax.jit(jax.vmap(lambda key: sample(logits, key)))(keys)
    logs = jax.vmap(lambda own: log_prob(logits, own))(drawn)
    assert float(logs.min()) > MASKED / 2
    share = np.bincount(np.asarray(drawn.kind), minlength=5) / 4_000
    np.testing.assert_allclose(share, jax.nn.softmax(logits.kind), atol=0.035)
    first = best(logits)
    assert float(log_prob(logits, first)) > MASKED / 2
    assert int(first.kind) == int(np.argmax(logits.kind))


def test_nothing_but_waiting_is_left_where_nothing_is_legal():
    graph = drawn_graph(0)
    none = jax.tree.map(np.zeros_like, graph.legal)
    logits, _ = ASKED(graph._replace(legal=none))
    assert int(best(logits).kind) == Kind.WAIT
    assert float(log_prob(logits, Choice(0, 0, 0, 0, 0))) == pytest.approx(0.0, abs=1e-6)
    gradient = jax.grad(lambda kind: sum(entropies(logits._replace(kind=kind)).values()))
    assert np.isfinite(gradient(logits.kind)).all()


def test_jit_is_eager_and_mapped_is_looped():
    graphs = [drawn_graph(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *graphs)
    mapped = eqx.filter_jit(eqx.filter_vmap(SHARP))(stacked)
    for i, graph in enumerate(graphs):
        eager = SHARP(graph)
        for found, compiled, expected in zip(
            jax.tree.leaves(jax.tree.map(lambda leaf, i=i: leaf[i], mapped)),
            jax.tree.leaves(ASKED(graph)),
            jax.tree.leaves(eager),
            strict=True,
        ):
            close(found, expected, 1e-4)
            close(compiled, expected, 1e-4)


def test_the_order_of_nodes_and_how_far_a_graph_is_filled_up_change_nothing():
    random = np.random.default_rng(7)
    topology = chain(5, {(0, 3), (1, 4)})
    small = pad_topology(topology, nodes=8, slots=4, more=0)
    readings = drawn_readings(random, 8, there=small.there)
    logits, value = ASKED(model_graph(readings, small, np))
    order = np.array([3, 0, 4, 1, 2, 5, 6, 7])
    other = model_graph(reordered(readings, order), reordered_edges(small, order), np)
    turned, turned_value = ASKED(other)
    close(turned_value, value, 1e-4)
    close(turned.kind, logits.kind, 1e-4)
    close(turned.site, logits.site[:, order], 1e-4)
    close(turned.kernel, logits.kernel[order], 1e-4)
    close(turned.seed, logits.seed[:, order], 1e-4)
    large = pad_topology(topology, nodes=12, slots=4, more=0)
    wider = jax.tree.map(
        lambda own: (
            np.concatenate([own, np.zeros((4, *own.shape[1:]), own.dtype)])
            if np.ndim(own) and own.shape[0] == 8
            else own
        ),
        readings,
    )
    filled, filled_value = ASKED(model_graph(wider, large, np))
    close(filled_value, value, 1e-4)
    close(filled.site[:, :8], logits.site, 1e-4)


def test_kernels_are_told_apart_by_what_describes_them_and_not_by_their_place():
    graph = drawn_graph(1)
    turned = graph._replace(
        kernels=graph.kernels[::-1], legal=graph.legal._replace(graft=graph.legal.graft[:, ::-1])
    )
    close(ASKED(turned)[0].kernel, ASKED(graph)[0].kernel[:, ::-1], 1e-4)


def test_a_new_model_of_one_bucket_compiles_nothing():
    from esper.execution import count_compilations

    ASKED(drawn_graph(0, count=5))
    with count_compilations() as count:
        ASKED(drawn_graph(1, count=7))
        ASKED(drawn_graph(2, count=4, extra={(0, 2)}))
    assert count() == 0


def test_a_new_policy_is_sure_of_nothing():
    policy = make_policy(jax.random.key(1))
    logits, value = policy(drawn_graph(0))
    share = jax.nn.softmax(logits.kind)
    assert float(share.max() - share.min()) < 0.02
    assert abs(float(value)) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_gradients_compiled_are_those_uncompiled(seed):
    """Compilers compute some things twice, and round them in two ways."""
    graph = drawn_graph(seed)

    def asked(params, run):
        own = graph._replace(run=run)
        logits, value = eqx.combine(params, static)(own)
        return value + jax.nn.log_softmax(logits.kind)[0]

    params, static = eqx.partition(SHARP, eqx.is_inexact_array)
    differentiated = jax.grad(asked)
    compiled = jax.jit(jax.vmap(differentiated, (None, 0)))
    runs = np.stack([graph.run, graph.run + 0.5, graph.run - 0.25]).astype(np.float32)
    found = compiled(params, runs)
    for place, run in enumerate(runs):
        expected = differentiated(params, run)
        jax.tree.map(lambda a, b, at=place: close(a[at], b, 1e-3), found, expected)


def test_rows_are_normalised_as_the_layer_says():
    norm = eqx.nn.LayerNorm(16)
    drawn = jax.random.normal(jax.random.key(1), (16,))
    norm = eqx.tree_at(lambda own: (own.weight, own.bias), norm, (drawn, drawn[::-1]))
    h = 3.0 * jax.random.normal(jax.random.key(2), (12, 16)) + 5.0
    close(_normalised(norm, h), jax.vmap(norm)(h), 1e-4)
    pull = jax.random.normal(jax.random.key(3), h.shape)
    ours, theirs = (
        jax.grad(lambda x, own=own: jnp.sum(pull * own(x)))(h)
        for own in (lambda x: _normalised(norm, x), jax.vmap(norm))
    )
    close(ours, theirs, 1e-4)
    alike = jnp.full((3, 16), 7.0)
    close(_normalised(norm, alike), jnp.broadcast_to(norm.bias, alike.shape), 1e-2)
    assert jnp.isfinite(jax.grad(lambda x: jnp.sum(pull[:3] * _normalised(norm, x)))(alike)).all()

"""Seeds in a list: all that a policy finds is what it finds without one."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.tamiyo.graph import SEED, list_seeds, model_graph, pad_topology
from esper.tamiyo.policy import (
    MASKED,
    Choice,
    Familiar,
    Kind,
    LoadedPolicy,
    best,
    log_prob,
    make_effects,
    make_policy,
    summary,
)
from esper_functional import SeedLifecycleState
from tests.esper.model_graphs import chain, drawn_readings

NODES, SEEDS = 192, 4
POLICY = make_policy(jax.random.key(0), width=16, rounds=2, heads=2)
EFFECTS = make_effects(jax.random.key(1), 16)


def graph_of(share, seed=0, count=180):
    """A graph of which about this share of seeds holds something."""
    random = np.random.default_rng(seed)
    edges = pad_topology(chain(count), nodes=NODES)
    readings = drawn_readings(random, NODES, SEEDS, 3, edges.there)
    empty = random.random((NODES, SEEDS)) >= share
    nothing = {
        "stage": np.uint8(SeedLifecycleState.DORMANT), "alpha": 0, "age": 0, "held": 0,
        "health": np.nan, "health_before": np.nan, "worth": np.nan, "worth_half": np.nan,
    }  # fmt: skip

    def emptied(name, value):
        own = getattr(readings, name)
        where = empty.reshape(*empty.shape, *[1] * (own.ndim - 2))
        return np.where(where, np.asarray(value, own.dtype), own)

    readings = readings._replace(**{own: emptied(own, value) for own, value in nothing.items()})
    return model_graph(readings, edges, np)


@pytest.mark.parametrize(("share", "rows"), [(0.0, 96), (0.1, 96), (0.15, 192), (0.3, 384)])
def test_a_list_holds_each_seed_that_is_not_as_all_others(share, rows):
    graph = graph_of(share)
    listed = list_seeds(graph)
    assert len(listed.seeds) == rows
    assert listed.seeds.dtype == np.float32
    assert not listed.seeds[:, SEED:].any()
    there, features = graph.edges.there, listed.seeds[listed.held.at][..., :SEED]
    np.testing.assert_array_equal(features[there], graph.seeds[there])
    own = listed.held.at != rows - 1
    nodes = np.broadcast_to(np.arange(NODES)[:, None], own.shape)
    np.testing.assert_array_equal(listed.held.node[listed.held.at][own], nodes[own])
    assert not own[~there].any()
    jax.tree.map(np.testing.assert_array_equal, listed[:2], graph[:2])


def test_a_list_is_full_when_one_row_is_left_for_those_that_hold_nothing():
    graph = graph_of(1.0, count=NODES)
    empty = np.zeros(SEED, np.float32)
    empty[SeedLifecycleState.DORMANT] = 1.0
    seeds = np.tile(empty, (NODES, SEEDS, 1))
    seeds.reshape(-1, SEED)[:95, SEED - 1] = 0.5
    assert len(list_seeds(graph._replace(seeds=seeds)).seeds) == 96
    seeds.reshape(-1, SEED)[95, SEED - 1] = 0.5
    assert len(list_seeds(graph._replace(seeds=seeds)).seeds) == 192


@pytest.mark.parametrize("graph", [graph_of(1.0), graph_of(0.6)], ids=["all", "most"])
def test_where_a_list_would_be_no_shorter_there_is_none(graph):
    assert list_seeds(graph) is graph


def test_a_small_network_has_none():
    edges = pad_topology(chain(128), nodes=128)
    readings = drawn_readings(np.random.default_rng(0), 128, 4, 3, edges.there)
    graph = model_graph(readings._replace(stage=np.zeros((128, 4), np.uint8)), edges, np)
    assert list_seeds(graph) is graph


@jax.jit
def found(graph):
    embedded = POLICY.embed(graph)
    logits, value = POLICY.heads(graph, embedded)
    choice = best(logits)
    effects = [
        EFFECTS(embedded, Choice(jnp.int32(kind), *choice[1:]))
        for kind in (Kind.GRAFT, Kind.UNLOAD, Kind.RETARGET)
    ]
    return logits, value, choice, effects


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_policy_finds_the_same(share):
    graph = graph_of(share, seed=3)
    listed = list_seeds(graph)
    assert listed.held is not None
    ours, theirs = found(listed), found(graph)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)
    for own, other in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_array_equal(own == np.float32(MASKED), other == np.float32(MASKED))


def test_advice_on_a_large_network_is_that_without_a_list():
    graph = graph_of(0.1, seed=3)
    sums = np.asarray(summary(graph))
    familiar = Familiar(sums, np.ones_like(sums), np.float32(1.0))
    loaded = LoadedPolicy(POLICY, EFFECTS, familiar, math.inf, 0.0, {})
    ours = loaded.decide(graph)
    (theirs,) = loaded.decide_many(jax.tree.map(lambda leaf: leaf[None], graph))
    assert ours.wanted == theirs.wanted
    assert ours.wanted.kind != Kind.WAIT
    assert [name for name, _ in ours.reasons] == [name for name, _ in theirs.reasons]
    for name in ("value", "confidence", "epistemic", "aleatoric", "effect", "distance"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4, abs=1e-5), name


@eqx.filter_jit
def gradient(policy, graph, choice):
    def likely(policy):
        logits, value = policy(graph)
        return log_prob(logits, choice) + value

    return eqx.filter_grad(likely)(policy)


@pytest.mark.parametrize("kind", [Kind.GRAFT, Kind.UNLOAD, Kind.RETARGET])
def test_gradients_are_the_same(kind):
    graph = graph_of(0.3, seed=5)
    places = np.argwhere(graph.legal.graft if kind is Kind.GRAFT else graph.legal.unload)
    node, other = (int(own) for own in places[0])
    seed, kernel = (0, other) if kind is Kind.GRAFT else (other, 0)
    choice = Choice(*(jnp.int32(own) for own in (kind, node, seed, kernel, 2)))
    ours, theirs = (gradient(POLICY, own, choice) for own in (list_seeds(graph), graph))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)


def test_networks_of_one_size_that_grow_take_few_programs():
    shapes = {list_seeds(graph_of(share / 40, seed=share)).seeds.shape for share in range(40)}
    assert len(shapes) == 4  # three lists, and none

"""What learning makes of the policy over model graphs: exact divergences, and a game on graphs."""

import itertools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.execution import count_compilations
from esper.tamiyo.learning import (
    CHOICES,
    Learner,
    LearningSettings,
    Recorded,
    choice_kl,
    clone_loss,
)
from esper.tamiyo.policy import ALPHAS, Choice, Kind, log_prob, make_policy
from tests.esper.model_graphs import drawn_graph

POLICY = make_policy(jax.random.key(0), width=8, rounds=1, heads=2)
# First logits are all but uniform; these are not.
SHARP, OTHER = (
    jax.tree.map(lambda leaf, by=by: leaf * by if eqx.is_array(leaf) else leaf, POLICY)
    for by in (3.0, 2.0)
)
DIVERGENCE = jax.jit(choice_kl)
OF_EACH = jax.jit(jax.vmap(log_prob, (None, 0)))
ASKED = eqx.filter_jit(lambda policy, graph: policy(graph)[0])


def every_choice(graph):
    """All that are legal."""
    legal = graph.legal
    rows = [(Kind.WAIT, 0, 0, 0, 0)]
    rows += [(Kind.GRAFT, node, 0, kernel, 0) for node, kernel in np.argwhere(legal.graft)]
    places = ((Kind.UNLOAD, legal.unload), (Kind.FOSSILIZE, legal.fossilize))
    rows += [(k, node, seed, 0, 0) for k, own in places for node, seed in np.argwhere(own)]
    rows += [
        (Kind.RETARGET, node, seed, 0, alpha)
        for (node, seed), alpha in itertools.product(
            np.argwhere(legal.retarget), range(len(ALPHAS))
        )
    ]
    return Choice(*np.array(rows, np.int32).T)


@pytest.mark.parametrize("seed", range(3))
def test_the_divergence_is_that_over_all_legal_choices(seed):
    graph = drawn_graph(seed)
    logits, others = ASKED(SHARP, graph), ASKED(OTHER, graph)
    choices = every_choice(graph)
    one, other = (np.asarray(OF_EACH(own, choices), np.float64) for own in (logits, others))
    assert np.exp(one).sum() == pytest.approx(1.0, abs=1e-5)
    expected = np.sum(np.exp(one) * (one - other))
    assert expected > 1e-4
    assert float(DIVERGENCE(logits, others)) == pytest.approx(expected, abs=1e-6, rel=1e-4)
    assert float(DIVERGENCE(logits, logits)) == 0.0


def test_gradients_are_finite_where_little_is_legal():
    graph = drawn_graph(0)
    nothing = graph.legal._replace(**{
        name: np.zeros_like(getattr(graph.legal, name))
        for name in ("graft", "unload", "fossilize", "retarget")
    })  # fmt: skip
    params, static = eqx.partition(SHARP, eqx.is_inexact_array)

    @jax.jit
    @jax.value_and_grad
    def loss(params, graph):
        policy = eqx.combine(params, static)
        batch = jax.tree.map(lambda leaf: leaf[None], graph)
        recorded = Recorded(batch, Choice(*jnp.zeros((5, 1), jnp.int32)), jnp.ones(1))
        kl = choice_kl(POLICY(graph)[0], policy(graph)[0])
        return kl + clone_loss(policy, recorded, CHOICES, value_weight=1.0)[0]

    for own in (graph, graph._replace(legal=nothing)):
        value, gradient = loss(params, jax.tree.map(jnp.asarray, own))
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


GRAPHS = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(drawn_graph(seed) for seed in range(4)))


class Step(NamedTuple):
    graph: Any
    reward: jax.Array
    done: jax.Array
    info: dict[str, jax.Array]


class GraftEarly(NamedTuple):
    """Model graphs drawn by lot; a graft pays 1 at a run's beginning, and waiting pays 1 later."""

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        key, own = jax.random.split(key)
        graph = jax.tree.map(lambda leaf: leaf[jax.random.randint(own, (), 0, 4)], GRAPHS)
        late = jax.random.bernoulli(own).astype(jnp.float32)
        graph = graph._replace(run=graph.run.at[0].set(4.0 * late))
        return (key, late), graph

    def step(self, state: Any, choice: Choice) -> tuple[Any, Step]:
        key, late = state
        right = jnp.where(late > 0, Kind.WAIT, Kind.GRAFT)
        reward = (choice.kind == right).astype(jnp.float32)
        after, graph = self.reset(key)
        return after, Step(graph, reward, jnp.ones((), bool), {})


def test_a_policy_over_graphs_learns_when_to_graft():
    settings = LearningSettings(
        envs=64, steps=4, epochs=4, minibatches=2, rate=5e-3, target_kl=0.03
    )
    learner = Learner(GraftEarly(), POLICY, settings)
    state = learner.iterate(learner.start(jax.random.key(0)))
    rows = [learner.metrics(state)]
    with count_compilations() as count:
        for _ in range(60):
            state = learner.iterate(state)
            rows.append(learner.metrics(state))
    assert count() == 0
    assert rows[0]["return"] < 0.6
    assert sum(row["skipped"] for row in rows) == 0
    assert np.mean([row["return"] for row in rows[-5:]]) > 0.8
    assert set(rows[0]["kinds"]) == {kind.name.lower() for kind in Kind}
    # One iteration: what is estimated is near what is exact.
    kls = np.array([[row["kl"], row["exact_kl"]] for row in rows])
    np.testing.assert_allclose(kls[:, 0].mean(), kls[:, 1].mean(), rtol=0.5)

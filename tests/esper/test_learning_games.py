"""Policies that learn reach what is known to be the best, and one program does an iteration."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.errors import InputError, Interrupted
from esper.execution import count_compilations
from esper.tamiyo.learning import (
    CloneSettings,
    Learner,
    LearningSettings,
    OfflineSettings,
    Recorded,
    ReplayStore,
    Transition,
    begin,
    fine_tune_offline,
    gae,
    pretrain,
    rollout,
    train,
)
from tests.esper.learning_games import PULLS, Bandit, Chain, Choice, table
from tests.tolerance import assert_bitwise, assert_close

QUICK = {"envs": 16, "steps": 8, "rate": 0.05, "minibatches": 2}
A2C = {"algorithm": "a2c", "epochs": 1, "minibatches": 1, "trace": 1.0, "rate": 0.1}


def likelihood(policy, state, kind, arm):
    choice = Choice(jnp.array(kind), jnp.array(arm))
    return float(jnp.exp(PULLS.log_prob(policy(jnp.array(state))[0], choice)))


def test_the_best_arm_is_found():
    settings = LearningSettings(**QUICK | {"iterations": 40} | A2C)
    found = train(Bandit(), table(1), settings, jax.random.key(0), distribution=PULLS)
    assert likelihood(found.policy, 0, 1, 2) > 0.9
    assert np.mean([row["return"] for row in found.metrics[-5:]]) > 0.85
    assert found.diagnosis.health == "healthy"
    assert all(row["length"] == 1 for row in found.metrics)
    assert all(row["episodes"] == 16 * 8 for row in found.metrics)


@pytest.mark.parametrize("settings", [{}, A2C])
def test_a_reward_at_the_end_of_a_chain_is_found(settings):
    settings = LearningSettings(
        **QUICK
        | {"iterations": 80, "envs": 32, "entropy_weight": 0.02, "discount": 0.95}
        | settings
    )
    found = train(Chain(3), table(4), settings, jax.random.key(1), distribution=PULLS)
    # The best return is 1 and three steps at 0.1.
    assert np.mean([row["return"] for row in found.metrics[-5:]]) > 0.6
    assert all(likelihood(found.policy, state, 1, 0) > 0.8 for state in range(3))
    values = [float(found.policy(jnp.array(state))[1]) for state in range(3)]
    assert values == sorted(values)
    assert values[2] == pytest.approx(0.9, abs=0.15)


def recorded(policy, count, game):
    """Choices of a policy, with what came of them."""
    walk = begin(game, 8, jax.random.key(5))
    _, steps = jax.jit(lambda walk: rollout(game, policy, PULLS, walk, count, jax.random.key(6)))(
        walk
    )
    found = gae(
        steps.reward, jnp.zeros_like(steps.reward), steps.done, jnp.zeros(8), 0.95, 1.0
    ).returns
    return jax.tree.map(
        lambda leaf: np.asarray(leaf.reshape(-1, *leaf.shape[2:])),
        (Recorded(steps.graph, steps.choice, found), steps),
    )


def test_cloning_comes_to_the_frequencies_of_what_was_done():
    data, _ = recorded(table(1, 3), 64, Bandit(0.1))
    fitted = pretrain(
        table(1), data, CloneSettings(epochs=30, batch=100, rate=0.1), jax.random.key(0),
        distribution=PULLS,
    )  # fmt: skip
    assert len(fitted.losses) == 30 * 6
    pulled = data.choice.kind == 1
    for arm in range(3):
        often = np.mean(pulled & (data.choice.arm == arm))
        assert likelihood(fitted.policy, 0, 1, arm) == pytest.approx(often, abs=0.04)
    assert float(fitted.policy(jnp.array(0))[1]) == pytest.approx(data.returns.mean(), abs=0.1)
    # At first nothing is known, and waiting has half of all probability.
    unknown = np.where(pulled, np.log(1 / 6), np.log(1 / 2)).mean()
    assert np.log(fitted.likelihoods[0]) == pytest.approx(unknown, abs=0.1)
    assert fitted.likelihoods[-6:].mean() > fitted.likelihoods[0]


SOMETIMES_RIGHT = eqx.tree_at(
    lambda own: (own.kind, own.arm),
    table(4),
    (jnp.tile(jnp.array([0.0, 1.0]), (4, 1)), jnp.tile(jnp.array([1.0, 0.0, 0.0]), (4, 1))),
)


def test_advantages_make_better_what_was_done():
    data, _ = recorded(table(1), 64, Bandit(0.1))
    store = ReplayStore(jax.tree.map(lambda leaf: leaf[0], data), 300, seed=1)
    store.add(data)
    settings = OfflineSettings(updates=100, batch=64, temperature=0.1, rate=0.05)
    found = fine_tune_offline(table(1), store, settings, distribution=PULLS)
    assert likelihood(found.policy, 0, 1, 2) > 0.9
    assert len(found.losses) == 100


def test_transitions_without_returns_are_learnt_from_too():
    data, steps = recorded(SOMETIMES_RIGHT, 200, Chain(2))
    # Walks lie side by side: what a step leads to is eight rows on.
    every = Transition(data.graph[:-8], data.choice, steps.reward, steps.done, data.graph[8:])
    every = jax.tree.map(lambda leaf: leaf[: len(data.graph) - 8], every)
    store = ReplayStore(jax.tree.map(lambda leaf: leaf[0], every), 2000, seed=1)
    store.add(every)
    settings = OfflineSettings(updates=250, batch=128, temperature=0.05, rate=0.05, discount=0.95)
    found = fine_tune_offline(table(4), store, settings, distribution=PULLS)
    assert all(likelihood(found.policy, state, 1, 0) > 0.8 for state in range(2))
    stopped = fine_tune_offline(table(4), store, settings, distribution=PULLS, enough=lambda: True)
    assert stopped.losses.shape == (0,)
    assert_bitwise(stopped.policy, table(4))


def test_stores_of_something_else_and_no_examples_are_refused():
    store = ReplayStore(np.float32(0), 3)
    store.add(np.ones(2, np.float32))
    with pytest.raises(InputError, match="the store holds float32|the store holds ndarray"):
        fine_tune_offline(table(1), store, OfflineSettings(), distribution=PULLS)
    none = Recorded(np.zeros(0, np.int32), Choice(*np.zeros((2, 0), np.int32)), np.zeros(0))
    with pytest.raises(InputError, match="no example to clone"):
        pretrain(table(1), none, CloneSettings(), jax.random.key(0), distribution=PULLS)


def test_iterations_after_the_first_compile_nothing_and_follow_from_the_key():
    learner = Learner(Bandit(), table(1), LearningSettings(**QUICK, target_kl=0.05), PULLS)
    state = learner.start(jax.random.key(0))
    before = jax.tree.map(lambda leaf: leaf.aval, state)
    state = learner.iterate(state)
    learner.metrics(state)
    assert jax.tree.map(lambda leaf: leaf.aval, state) == before
    with count_compilations() as count:
        for _ in range(3):
            state = learner.iterate(state)
            learner.metrics(state)
    assert count() == 0
    # The same again, and something else by another key.
    states = [learner.iterate(learner.start(jax.random.key(key))) for key in (0, 0, 1)]
    assert_bitwise(states[0].params, states[1].params)
    assert not np.array_equal(states[0].params.kind, states[2].params.kind)


def test_walks_are_what_one_environment_does_alone():
    game, policy = Chain(2), table(3, 1)
    walk = begin(game, 3, jax.random.key(1))
    after, steps = rollout(game, policy, PULLS, walk, 9, jax.random.key(2))
    for env in range(3):
        state, graph, returned = *game.reset(None), 0.0
        for t in range(9):
            assert int(graph) == int(steps.graph[t, env])
            choice = jax.tree.map(lambda leaf, at=(t, env): leaf[at], steps.choice)
            state, step = game.step(state, choice)
            returned += float(step.reward)
            assert float(steps.returned[t, env]) == pytest.approx(returned)
            assert bool(steps.done[t, env]) == bool(step.done)
            returned, graph = 0.0 if step.done else returned, step.graph
        assert_close(after.states[env], state)
    logits, value = jax.vmap(jax.vmap(policy))(steps.graph)
    assert_close(steps.value, value)
    assert_close(steps.log_prob, jax.vmap(jax.vmap(PULLS.log_prob))(logits, steps.choice))


def test_learning_stops_within_an_iteration_where_it_went_too_far():
    settings = LearningSettings(**QUICK | {"rate": 0.3}, epochs=8, target_kl=1e-3)
    learner = Learner(Bandit(), table(1), settings, PULLS)
    row = learner.metrics(learner.iterate(learner.start(jax.random.key(0))))
    # Of 16; the first changes the policy, and what is seen of it later is too far.
    assert 1 <= row["updates"] < 4
    assert row["kl"] > 1.5e-3


def test_a_penalty_adapts_to_the_divergence():
    settings = LearningSettings(
        **QUICK | {"rate": 0.3}, iterations=30, decay="linear", target_kl=0.01, kl_penalty=1.0
    )
    found = train(Bandit(), table(1), settings, jax.random.key(0), distribution=PULLS)
    weights = [row["kl_weight"] for row in found.metrics] + [float(found.state.kl_weight)]
    changes = zip(found.metrics, weights, weights[1:], strict=False)
    factors = set()
    for row, before, after in changes:
        kl = row["exact_kl"]
        expected = 2.0 if kl > 0.015 else 0.5 if kl < 0.01 / 1.5 else 1.0
        assert after == before * expected
        factors.add(expected)
    assert {0.5, 2.0} <= factors
    assert likelihood(found.policy, 0, 1, 2) > 0.9


class Broken(Bandit):
    """Every reward is infinite."""

    def step(self, key, choice):
        key, step = super().step(key, choice)
        return key, step._replace(reward=step.reward + jnp.inf)


def test_what_is_not_finite_changes_nothing_and_is_told():
    settings = LearningSettings(**QUICK, iterations=2)
    found = train(Broken(), table(1), settings, jax.random.key(0), distribution=PULLS)
    assert_bitwise(found.state.params, table(1))
    assert found.metrics[-1]["skipped"] == found.metrics[-1]["updates"] == 8
    assert found.metrics[-1]["loss"] is None
    assert found.diagnosis.health == "diverging"
    json.dumps(found.metrics, allow_nan=False)


def test_rows_tell_what_was_done_and_when_to_stop():
    rows = []
    settings = LearningSettings(**QUICK, iterations=4, decay="linear")
    with pytest.raises(Interrupted, match="stopped before iteration 2; nothing was kept of it"):
        train(
            Bandit(), table(1), settings, jax.random.key(0), distribution=PULLS,
            told=rows.append, stop=lambda: len(rows) == 2,
        )  # fmt: skip
    assert [row["iteration"] for row in rows] == [0, 1]
    np.testing.assert_allclose([row["rate"] for row in rows], [0.05, 0.0375], rtol=1e-6)
    for row in rows:
        assert sum(row["kinds"].values()) == pytest.approx(1.0)
        assert row["info"]["pulled"] == pytest.approx(row["kinds"]["pull"])
        assert row["ended"] == row["info"]
        assert row["entropy"] == pytest.approx(sum(row["entropies"].values()), rel=1e-5)
        # Exact and estimated divergence are of one step.
        assert row["exact_kl"] == pytest.approx(row["kl"], rel=0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations of learning must be a whole number of at least 1, got 0"),
        ({"discount": 1.1}, "discount of learning must be .* at least 0 and at most 1, got 1.1"),
        ({"rate": -1.0}, "rate of learning must be a finite number of at least 0, got -1"),
        ({"entropy_weight": -1.0}, "entropy_weight of learning must be a finite"),
        ({"target_kl": -0.1}, "target_kl of learning must be a finite number of at least 0"),
        ({"algorithm": "dqn"}, "algorithm of learning must be one of ppo, a2c, got 'dqn'"),
        ({"decay": "cosine"}, "decay of learning must be one of constant, linear, got 'cosine'"),
        ({"minibatches": 5}, "5 minibatches do not divide the 2048 steps of an iteration, 64 env"),
        ({"algorithm": "a2c"}, "a2c learns once from each step: .* not 4 and 4"),
        ({"kl_penalty": 1.0}, "kl_penalty adapts to target_kl: give that too"),
    ],
)
def test_settings_outside_of_their_range_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        LearningSettings(**change)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (CloneSettings, {"epochs": 0}, "epochs of learning must be a whole number of at least 1"),
        (CloneSettings, {"rate": -1.0}, "rate of learning must be a finite number of at least 0"),
        (OfflineSettings, {"batch": 0}, "batch of learning must be a whole number of at least 1"),
        (OfflineSettings, {"temperature": 0.0}, "temperature of learning must be a finite number"),
        (OfflineSettings, {"most": 0.5}, "most of learning must be a finite number of at least 1"),
        (OfflineSettings, {"correction": 2.0}, "correction of learning must be .* at most 1, got"),
    ],
)
def test_settings_of_fitting_are_refused(kind, change, message):
    with pytest.raises(InputError, match=message):
        kind(**change)


def test_what_is_no_floating_point_array_does_not_learn():
    class Named(eqx.Module):
        inner: eqx.Module
        offset: jax.Array
        name: str

        def __call__(self, state):
            return self.inner(state + self.offset)

    policy = Named(table(1), jnp.zeros((), jnp.int32), "by name")
    settings = LearningSettings(**QUICK, iterations=1)
    found = train(Bandit(), policy, settings, jax.random.key(0), distribution=PULLS).policy
    assert (found.name, int(found.offset)) == ("by name", 0)
    assert not np.array_equal(found.inner.kind, policy.inner.kind)

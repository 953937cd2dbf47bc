"""Pieces of losses: by hand, by differences, and by the laws that estimators keep."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import InputError
from esper.tamiyo.learning import (
    Batch,
    Diagnosis,
    Recorded,
    a2c_loss,
    approximate_kl,
    awr_loss,
    clipped_surrogate,
    clone_loss,
    explained_variance,
    gae,
    normalised,
    ppo_loss,
    value_error,
    verdict,
)
from tests.esper.learning_games import ARMS, PULLS, Choice, table
from tests.tolerance import assert_close

TIME, ENVS = 7, 3


def episodes(seed, *shape):
    rng = np.random.default_rng(seed)
    rewards, values, final = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    dones = rng.random(shape) < 0.3
    truncated = dones & (rng.random(shape) < 0.5)
    bootstrap = rng.standard_normal(shape[1:]).astype(np.float32)
    return rewards, values, dones, bootstrap, truncated, final


def by_hand(rewards, values, dones, bootstrap, discount, trace, truncated, final):
    """Sums over the steps of each episode, as the paper writes them (its equation 16)."""
    advantages = np.zeros(len(rewards))
    after = np.append(values[1:], bootstrap)
    for start in range(len(rewards)):
        weight = 1.0
        for t in range(start, len(rewards)):
            then = (final[t] if truncated[t] else 0.0) if dones[t] else after[t]
            advantages[start] += weight * (rewards[t] + discount * then - values[t])
            if dones[t]:
                break
            weight *= discount * trace
    return advantages.astype(np.float32)


UNIT = st.floats(0, 1)
COMPILED = jax.jit(lambda r, v, d, b, t, f: gae(r, v, d, b, 0.9, 0.8, truncated=t, final_values=f))


@given(st.integers(0, 1000), UNIT, UNIT)
def test_advantages_are_those_of_the_paper_in_every_environment(seed, discount, trace):
    r, v, d, b, t, f = episodes(seed, TIME, ENVS)
    found = gae(*map(jnp.asarray, (r, v, d, b)), discount, trace, truncated=t, final_values=f)
    for env in range(ENVS):
        own = [column[:, env] for column in (r, v, d)]
        expected = by_hand(*own, b[env], discount, trace, t[:, env], f[:, env])
        assert_close(found.advantages[:, env], expected)
    assert_close(found.returns, np.asarray(found.advantages) + v)


def test_jit_equals_eager_and_one_environment_needs_no_axis():
    r, v, d, b, t, f = episodes(0, TIME, ENVS)
    found = COMPILED(r, v, d, b, t, f)
    assert_close(found.advantages, gae(r, v, d, b, 0.9, 0.8, truncated=t, final_values=f)[0])
    one = gae(r[:, 0], v[:, 0], d[:, 0], b[0], 0.9, 0.8, truncated=t[:, 0], final_values=f[:, 0])
    assert_close(one.advantages, found.advantages[:, 0])


def test_what_comes_after_an_end_is_of_no_matter():
    r, v, _, b, _, _ = episodes(1, TIME)
    dones = np.arange(TIME) == 3
    ours = gae(r, v, dones, b, 0.9, 0.95).advantages
    r[4:], v[4:] = 100.0, -100.0
    assert_close(gae(r, v, dones, b + 50, 0.9, 0.95).advantages[:4], ours[:4])


def test_with_trace_1_returns_are_those_of_n_steps():
    rewards = jnp.array([1.0, 2.0, 3.0])
    dones = jnp.array([False, True, False])
    found = gae(rewards, jnp.array([5.0, -1.0, 7.0]), dones, jnp.array(10.0), 0.5, 1.0)
    assert found.returns.tolist() == [1 + 0.5 * 2, 2, 3 + 0.5 * 10]
    one = gae(rewards, jnp.array([5.0, -1.0, 7.0]), dones, jnp.array(10.0), 0.5, 0.0)
    assert one.returns.tolist() == [1 + 0.5 * -1, 2, 3 + 0.5 * 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"discount": 1.5}, "the discount is from 0 to 1, and not 1.5"),
        ({"trace": -0.1}, "the trace is from 0 to 1, and not -0.1"),
        ({"values": jnp.zeros(4)}, r"values has the shape \(4,\); it is that of the rewards, \(3,"),
        ({"dones": jnp.zeros((3, 1), bool)}, r"dones has the shape \(3, 1\)"),
        ({"bootstrap": jnp.zeros(2)}, r"the bootstrap has the shape \(2,\); one number for each"),
        ({"truncated": jnp.zeros(3, bool)}, "truncated and final_values together"),
        (
            {"truncated": jnp.zeros(2, bool), "final_values": jnp.zeros(3)},
            r"truncated has the shape \(2,\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    zeros = jnp.zeros(3)
    given = {
        "rewards": zeros, "values": zeros, "dones": zeros > 0, "bootstrap": jnp.zeros(()),
        "discount": 0.9, "trace": 0.9,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        gae(**given | change)


def test_normalised_advantages_and_explained_variance():
    x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    assert_close(jnp.mean(normalised(x)), jnp.float32(0))
    assert_close(jnp.std(normalised(x)), jnp.float32(1))
    for constant in (0.0, 0.1, 1e6):
        assert not np.asarray(normalised(jnp.full(5, constant))).any()
    assert explained_variance(x, x) == 1
    assert explained_variance(jnp.zeros_like(x), x) == 0
    assert explained_variance(-x, x) == -3
    assert math.isnan(explained_variance(x, jnp.ones_like(x)))


STATE = jnp.zeros((), jnp.int32)


@jax.jit
@jax.value_and_grad
def ESTIMATED(policy, choices, old):
    new = jax.vmap(PULLS.log_prob, (None, 0))(policy(STATE)[0], choices)
    return jnp.sum(jnp.exp(old) * approximate_kl(new - old))


EXACT = jax.jit(jax.value_and_grad(lambda now, old: PULLS.kl(old(STATE)[0], now(STATE)[0])))
OF_EACH = jax.jit(jax.vmap(PULLS.log_prob, (None, 0)))


@given(st.integers(0, 1000))
def test_the_estimated_divergence_is_the_exact_one_in_its_mean_and_gradient(seed):
    before, now = table(1, seed), table(1, seed + 1)
    every = [Choice(jnp.array(0), jnp.array(0))]
    every += [Choice(jnp.array(1), jnp.array(arm)) for arm in range(ARMS)]
    choices = jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)
    old = OF_EACH(before(STATE)[0], choices)
    assert_close(jnp.sum(jnp.exp(old)), jnp.float32(1))

    divergence, ours = ESTIMATED(now, choices, old)
    exact, theirs = EXACT(now, before)
    assert_close(divergence, exact)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    # What the heads say adds up to the entropy of the choice.
    assert_close(sum(PULLS.entropies(before(STATE)[0]).values()), -jnp.sum(jnp.exp(old) * old))


@given(st.floats(-20, 20))
def test_the_estimated_divergence_is_never_below_0(log_ratio):
    assert approximate_kl(jnp.float32(log_ratio)) >= 0


def test_the_surrogate_gains_nothing_beyond_the_clip():
    log_ratio = jnp.log(jnp.array([0.5, 0.9, 1.1, 2.0]))
    gain = jax.grad(lambda x, a: jnp.sum(clipped_surrogate(x, a, 0.2)))
    ones = jnp.ones(4)
    assert_close(clipped_surrogate(log_ratio, ones, 0.2), jnp.array([0.5, 0.9, 1.1, 1.2]))
    assert_close(clipped_surrogate(log_ratio, -ones, 0.2), jnp.array([-0.8, -0.9, -1.1, -2.0]))
    assert (gain(log_ratio, ones) != 0).tolist() == [True, True, True, False]
    assert (gain(log_ratio, -ones) != 0).tolist() == [False, True, True, True]


def test_values_are_clipped_only_where_asked_for():
    value, before, returns = jnp.array([3.0]), jnp.array([0.0]), jnp.array([4.0])
    assert value_error(value, before, returns).tolist() == [0.5]
    assert value_error(value, before, returns, clip=1.0).tolist() == [4.5]


def batch_of(policy, seed=0, size=12):
    keys = jax.random.split(jax.random.key(seed), 4)
    states = jax.random.randint(keys[0], (size,), 0, 2)
    logits, values = jax.vmap(policy)(states)
    choices = jax.vmap(PULLS.sample)(logits, jax.random.split(keys[1], size))
    old = jax.vmap(PULLS.log_prob)(logits, choices)
    advantages, returns = jax.random.normal(keys[2], (2, size))
    return Batch(states, choices, old, values, advantages, returns, logits)


def test_the_ppo_loss_is_the_sum_of_its_terms():
    batch, policy = batch_of(table(2, 0)), table(2, 5)
    loss, terms = ppo_loss(
        policy, batch, PULLS, clip=0.1, entropy_weight=0.3, value_weight=0.7, kl_weight=2.0
    )
    logits, values = jax.vmap(policy)(batch.graph)
    log_ratio = jax.vmap(PULLS.log_prob)(logits, batch.choice) - batch.log_prob
    assert_close(terms.policy, -jnp.mean(clipped_surrogate(log_ratio, batch.advantage, 0.1)))
    assert_close(terms.value, 0.5 * jnp.mean((values - batch.returns) ** 2))
    assert_close(terms.entropy, jnp.float32(sum(terms.entropies.values())))
    assert_close(terms.exact_kl, jnp.mean(jax.vmap(PULLS.kl)(batch.logits, logits)))
    assert_close(terms.kl, jnp.mean(approximate_kl(log_ratio)))
    outside = np.abs(np.exp(log_ratio) - 1) > 0.1
    assert_close(terms.clip_fraction, np.float32(outside.mean()))
    total = terms.policy + 0.7 * terms.value - 0.3 * terms.entropy
    assert_close(loss, total + 2.0 * terms.exact_kl)
    without, _ = ppo_loss(
        policy, batch._replace(logits=None), PULLS, clip=0.1, entropy_weight=0.3,
        value_weight=0.7, kl_weight=2.0,
    )  # fmt: skip
    assert_close(without, total + 2.0 * terms.kl)
    jitted = eqx.filter_jit(ppo_loss)(policy, batch, PULLS)
    assert_close(jitted[0], ppo_loss(policy, batch, PULLS)[0])


def test_at_the_first_step_ppo_is_a2c():
    policy = table(2, 1)
    batch = batch_of(policy)
    weights = {"entropy_weight": 0.2, "value_weight": 0.4}
    ours = jax.jit(jax.grad(lambda p: ppo_loss(p, batch, PULLS, **weights)[0]))(policy)
    theirs = jax.jit(jax.grad(lambda p: a2c_loss(p, batch, PULLS, **weights)[0]))(policy)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b)
    terms = a2c_loss(policy, batch, PULLS)[1]
    assert (terms.kl, terms.clip_fraction) == (0, 0)


def slopes(loss, policy):
    """The gradient along its own sign, and the same by differences."""
    gradient = jax.jit(jax.grad(loss))(policy)
    along = jax.tree.map(jnp.sign, gradient)

    def moved(t):
        return float(jax.jit(loss)(jax.tree.map(lambda p, d: p + t * d, policy, along)))

    slope = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient))
    return slope, (moved(1e-2) - moved(-1e-2)) / 2e-2


RECORDED = Recorded(*(batch_of(table(2, 0))[at] for at in (0, 1, 5)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: ppo_loss(p, batch_of(table(2, 0)), PULLS, clip=5.0, kl_weight=0.5)[0],
        lambda p: a2c_loss(p, batch_of(table(2, 0)), PULLS)[0],
        lambda p: clone_loss(p, RECORDED, PULLS, value_weight=0.5)[0],
    ],
)
def test_gradients_are_those_of_differences(loss):
    ours, theirs = slopes(loss, table(2, 4))
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_cloning_is_the_likelihood_of_what_was_done():
    policy = table(2, 3)
    logits, values = jax.vmap(policy)(RECORDED.graph)
    log_prob = jax.vmap(PULLS.log_prob)(logits, RECORDED.choice)
    loss, terms = clone_loss(policy, RECORDED, PULLS)
    assert_close(loss, -jnp.mean(log_prob))
    assert_close(terms.likelihood, jnp.exp(jnp.mean(log_prob)))
    with_value, terms = clone_loss(policy, RECORDED, PULLS, value_weight=2.0)
    assert_close(with_value, loss + jnp.mean((values - RECORDED.returns) ** 2))
    first = jnp.zeros(12).at[0].set(12.0)
    assert_close(clone_loss(policy, RECORDED, PULLS, weights=first)[0], -log_prob[0])


def test_advantages_weigh_and_are_clipped():
    policy = table(2, 3)
    recorded = RECORDED._replace(returns=RECORDED.returns.at[0].set(1e6))
    logits, values = jax.vmap(policy)(recorded.graph)
    log_prob = np.asarray(jax.vmap(PULLS.log_prob)(logits, recorded.choice), np.float64)
    gap = np.asarray(recorded.returns - values, np.float64)
    weights = np.exp(np.minimum(gap / 0.5, np.log(3.0)))
    loss, terms = awr_loss(policy, recorded, PULLS, temperature=0.5, most=3.0, value_weight=0.0)
    assert_close(loss, np.float32(-np.mean(weights * log_prob)))
    assert_close(terms.clip_fraction, np.float32((gap / 0.5 > np.log(3.0)).mean()))
    assert_close(terms.advantages, gap.astype(np.float32))
    gradient = jax.grad(lambda p: awr_loss(p, recorded, PULLS, value_weight=0.0)[0])(policy)
    assert not np.asarray(gradient.value).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def row(**changes):
    return {
        "loss": 0.1, "gradient_norm": 1.0, "kl": 0.01, "entropy": 1.0, "return": 0.0,
        "explained_variance": 0.5, "kinds": {"wait": 0.5, "pull": 0.5},
    } | changes  # fmt: skip


def sure(*returns):
    """Rows of a policy that tries nothing any more."""
    return [row(**{"return": value, "entropy": 0.0, "kinds": {"wait": 1.0}}) for value in returns]


RISEN = [*np.linspace(0, 1, 10), *[1.0, 1.01] * 10]
FALLEN = [*np.linspace(0, 1, 10), *[1.0] * 10, *[0.0, 0.1] * 5]


@pytest.mark.parametrize(
    ("history", "health", "reason"),
    [
        ([], "healthy", None),
        ([row()] * 5, "healthy", None),
        ([{}], "healthy", None),
        (sure(*range(10)), "healthy", None),
        (sure(*RISEN), "healthy", None),
        (sure(*FALLEN), "collapsed", "and returns have not risen"),
        ([row(explained_variance=-1e-7)], "healthy", None),
        ([row(explained_variance=None, kl=math.nan)], "healthy", None),
        (
            [row(entropy=0.001)] * 10,
            "collapsed",
            "the entropy is 0.001 nats, below 0.02, and",
        ),
        ([row(kinds={"wait": 1.0})] * 10, "collapsed", "100.0% of all choices are wait, and ret"),
        ([row(kl=0.5)] * 3, "diverging", "moves by 0.5 nats an iteration, more than 0.2: lower"),
        ([row(loss=None)], "diverging", "the loss is not finite"),
        ([row(gradient_norm=math.inf)], "diverging", "the gradient_norm is not finite"),
        ([row(explained_variance=-2.0)], "misjudging", "values explain -2 of the returns' varian"),
        ([row(kl=9.0, entropy=0.0, explained_variance=-1.0)], "diverging", "the entropy is 0 nats"),
    ],
)
def test_what_is_wrong_is_told_with_its_reasons(history, health, reason):
    found = verdict(history)
    assert found.health == health
    if reason is None:
        assert found == Diagnosis("healthy", ())
    else:
        assert any(reason in why for why in found.reasons)


def test_only_the_last_iterations_count():
    bad, good = [row(kl=0.9)] * 5, [row()] * 5
    assert verdict(bad + good, window=5).health == "healthy"
    assert verdict(good + bad, window=5).health == "diverging"


def test_all_orders_of_what_is_wrong_name_the_worst_first():
    wrong = {"kl": 9.0, "entropy": 0.0, "explained_variance": -1.0}
    for names in itertools.permutations(wrong, 2):
        found = verdict([row(**{name: wrong[name] for name in names})])
        assert len(found.reasons) == 2
        assert found.health == ("diverging" if "kl" in names else "collapsed")

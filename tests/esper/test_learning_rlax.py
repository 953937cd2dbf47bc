"""The pieces of losses against those of rlax, which others wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from hypothesis import given
from hypothesis import strategies as st

from esper.tamiyo.learning import approximate_kl, clipped_surrogate, gae
from tests.esper.learning_games import PULLS, table
from tests.tolerance import assert_close

TIME = 9
SEEDS = st.integers(0, 1000)


@jax.jit
def both(rewards, values, dones, bootstrap):
    discounts = jnp.where(dones, 0.0, 0.97)
    every = jnp.append(values, bootstrap)
    theirs = rlax.truncated_generalized_advantage_estimation(rewards, discounts, 0.9, every)
    returns = rlax.lambda_returns(rewards, discounts, every[1:], 0.9)
    steps = rlax.n_step_bootstrapped_returns(rewards, discounts, every[1:], TIME)
    return gae(rewards, values, dones, bootstrap, 0.97, 0.9), theirs, returns, steps


@given(SEEDS)
def test_advantages_and_returns(seed):
    rng = np.random.default_rng(seed)
    rewards, values = rng.standard_normal((2, TIME)).astype(np.float32)
    dones = rng.random(TIME) < 0.3
    bootstrap = np.float32(rng.standard_normal())
    ours, theirs, returns, steps = both(rewards, values, dones, bootstrap)
    assert_close(ours.advantages, theirs)
    assert_close(ours.returns, returns)
    assert_close(gae(rewards, values, dones, bootstrap, 0.97, 1.0).returns, steps)


SURROGATE = jax.jit(
    jax.value_and_grad(lambda x, a: -jnp.mean(clipped_surrogate(x, a, 0.2)), argnums=0)
)
THEIR_SURROGATE = jax.jit(
    jax.value_and_grad(lambda x, a: rlax.clipped_surrogate_pg_loss(jnp.exp(x), a, 0.2), argnums=0)
)


@given(SEEDS)
def test_the_clipped_surrogate_and_its_gradient(seed):
    log_ratio, advantage = jax.random.normal(jax.random.key(seed), (2, 16)) * 0.3
    ours, theirs = SURROGATE(log_ratio, advantage), THEIR_SURROGATE(log_ratio, advantage)
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])


@pytest.mark.filterwarnings("ignore:Rlax .* will be deprecated:PendingDeprecationWarning")
def test_entropy_divergence_and_ratios_of_importance():
    one, other = (jax.vmap(table(6, key))(jnp.arange(6))[0] for key in (0, 1))
    heads = jax.vmap(PULLS.entropies)(one)
    assert_close(jnp.mean(heads["kind"]), -rlax.entropy_loss(one.kind, jnp.ones(6)))
    asked = jax.nn.softmax(one.kind)[:, 1]
    assert_close(jnp.mean(heads["arm"]), -rlax.entropy_loss(one.arm, asked))
    kl = jax.vmap(rlax.categorical_kl_divergence)
    expected = kl(one.kind, other.kind) + asked * kl(one.arm, other.arm)
    assert_close(jax.vmap(PULLS.kl)(one, other), expected)
    # Of arms, with pulling certain: the whole choice is the arm.
    arms = jax.random.randint(jax.random.key(2), (6,), 0, 3)
    ratios = rlax.categorical_importance_sampling_ratios(one.arm, other.arm, arms)
    rows = jnp.arange(6)
    log_ratio = jax.nn.log_softmax(one.arm)[rows, arms] - jax.nn.log_softmax(other.arm)[rows, arms]
    assert_close(jnp.exp(log_ratio), ratios)
    assert_close(approximate_kl(log_ratio), ratios - 1 - jnp.log(ratios))

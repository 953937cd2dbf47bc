"""Losses of a policy that learns from what others did: cloning, and by advantages."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esper.tamiyo.learning._distribution import Distribution
from esper.tamiyo.learning._losses import Policy


class Recorded(NamedTuple):
    """Choices that somebody made, good or not; every leaf has the leading axis `[batch]`."""

    graph: Any
    choice: Any
    returns: Float[Array, " batch"]
    """What followed, discounted."""


class OfflineTerms(NamedTuple):
    """What an offline loss is made of."""

    loss: Float[Array, ""]
    policy: Float[Array, ""]
    value: Float[Array, ""]
    likelihood: Float[Array, ""]
    """Of the recorded choices: the geometric mean of their probabilities."""
    advantages: Float[Array, " batch"]
    """Returns beyond the values."""
    clip_fraction: Float[Array, ""]
    """How many weights were clipped."""


def clone_loss(
    policy: Policy,
    recorded: Recorded,
    distribution: Distribution,
    *,
    value_weight: float = 0.0,
    weights: Float[Array, " batch"] | None = None,
) -> tuple[Float[Array, ""], OfflineTerms]:
    """Behaviour cloning: the mean negative log-likelihood of recorded choices.

    Args:
        policy: what is to learn.
        recorded: what is to be done as it was.
        distribution: of choices.
        value_weight: of half of the squared error of values, from 0; with 0 returns are not used.
        weights: of the examples, for instance importance weights; None for 1 each.
    """
    return _loss(policy, recorded, distribution, None, value_weight, weights)


def awr_loss(
    policy: Policy,
    recorded: Recorded,
    distribution: Distribution,
    *,
    temperature: float = 1.0,
    most: float = 20.0,
    value_weight: float = 0.5,
    weights: Float[Array, " batch"] | None = None,
) -> tuple[Float[Array, ""], OfflineTerms]:
    """Advantage-weighted regression (Peng et al., 2019).

        loss = -mean(min(exp((R - v) / β), ω) log π(choice)) + c_v value

    Args:
        policy: what is to learn.
        recorded: choices and what followed them.
        distribution: of choices.
        temperature: β, above 0, in units of the returns.
        most: ω, what a choice counts at most (ibid., section 5).
        value_weight: c_v, of half of the squared error of values, from 0.
        weights: of the examples, for instance importance weights; None for 1 each.
    """
    return _loss(policy, recorded, distribution, (temperature, most), value_weight, weights)


def with_returns(policy: Policy, kept: Any, discount: float) -> Recorded:
    """What was kept, with what followed.

    Args:
        policy: whose values are read.
        kept: `Recorded`, which has its returns, or a `Transition`, of which the return is
            estimated as r + γ V(after), and as r where nothing follows.
        discount: γ, from 0 to 1.
    """
    if isinstance(kept, Recorded):
        return kept
    after = jax.vmap(policy)(kept.next_graph)[1]
    # Not even 0 times the value where nothing follows: that may be anything.
    after = jnp.where(kept.done, 0.0, after)
    returns = jax.lax.stop_gradient(kept.reward + discount * after)
    return Recorded(kept.graph, kept.choice, returns)


def _loss(
    policy: Policy,
    recorded: Recorded,
    distribution: Distribution,
    by_advantage: tuple[float, float] | None,
    value_weight: float,
    weights: jax.Array | None,
) -> tuple[jax.Array, OfflineTerms]:
    logits, values = jax.vmap(policy)(recorded.graph)
    log_prob = jax.vmap(distribution.log_prob)(logits, recorded.choice)
    weights = jnp.ones_like(log_prob) if weights is None else weights
    advantages = jax.lax.stop_gradient(recorded.returns - values)
    counts, clipped = jnp.ones_like(log_prob), jnp.zeros_like(log_prob)
    if by_advantage is not None:
        temperature, most = by_advantage
        # Clipped as logarithms: the exponential of a large advantage is infinite.
        exponents = advantages / temperature
        clipped = (exponents > math.log(most)).astype(log_prob.dtype)
        counts = jnp.exp(jnp.minimum(exponents, math.log(most)))
    policy_loss = -jnp.mean(weights * counts * log_prob)
    value_loss = 0.5 * jnp.mean(weights * jnp.square(values - recorded.returns))
    loss = policy_loss + value_weight * value_loss if value_weight else policy_loss
    terms = OfflineTerms(
        loss, policy_loss, value_loss, jnp.exp(jnp.mean(log_prob)), advantages, jnp.mean(clipped)
    )
    return loss, jax.lax.stop_gradient(terms)

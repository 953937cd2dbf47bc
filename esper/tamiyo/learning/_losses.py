"""Losses of a policy that learns from its own steps: PPO and A2C."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esper.tamiyo.learning._distribution import Distribution

Policy = Callable[[Any], tuple[Any, jax.Array]]
"""`graph -> (logits, value)` of one graph; a pytree as well."""


class Batch(NamedTuple):
    """Steps to learn from; every leaf has the leading axis `[batch]`."""

    graph: Any
    choice: Any
    log_prob: Float[Array, " batch"]
    """Of the choice, under the policy that made it."""
    value: Float[Array, " batch"]
    """Estimated by the policy that made the choice."""
    advantage: Float[Array, " batch"]
    returns: Float[Array, " batch"]
    logits: Any = None
    """Those that the choice was drawn from, for an exact divergence; None goes without."""


class LossTerms(NamedTuple):
    """What a loss is made of, and how far the policy went; each a number."""

    loss: Float[Array, ""]
    policy: Float[Array, ""]
    value: Float[Array, ""]
    entropy: Float[Array, ""]
    """In nats, of the whole choice."""
    entropies: dict[str, Float[Array, ""]]
    """In nats, by head."""
    kl: Float[Array, ""]
    """KL(before ‖ now) in nats, estimated from the choices: never below 0."""
    exact_kl: Float[Array, ""]
    """KL(before ‖ now) from all logits; NaN without those."""
    clip_fraction: Float[Array, ""]
    """How many of the ratios were outside of the clipping range."""


def approximate_kl(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The estimator k3 = (r - 1) - log r of KL(before ‖ now) (Schulman, 2020).

    Of choices that were drawn before, with r = now / before. Its mean is the divergence, no value
    is below 0, and the mean of its gradient is the divergence's gradient.
    """
    return jnp.expm1(log_ratio) - log_ratio


def clipped_surrogate(
    log_ratio: Float[Array, "*batch"], advantage: Float[Array, "*batch"], clip: float
) -> Float[Array, "*batch"]:
    """min(r A, clip(r, 1 - ε, 1 + ε) A), to be made large (Schulman et al., 2017, equation 7)."""
    ratio = jnp.exp(log_ratio)
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage)


def value_error(
    value: Float[Array, "*batch"],
    before: Float[Array, "*batch"],
    returns: Float[Array, "*batch"],
    clip: float | None = None,
) -> Float[Array, "*batch"]:
    """Half of the squared error of values.

    Args:
        before: estimated by the policy that made the choices.
        clip: how far values may go from `before` before going on gains nothing; None for any
            distance. Clipping is known to help rarely (Andrychowicz et al., 2021, section 3.2).
    """
    error = jnp.square(value - returns)
    if clip is not None:
        near = before + jnp.clip(value - before, -clip, clip)
        error = jnp.maximum(error, jnp.square(near - returns))
    return 0.5 * error


def ppo_loss(
    policy: Policy,
    batch: Batch,
    distribution: Distribution,
    *,
    clip: float = 0.2,
    entropy_weight: float | Float[Array, ""] = 0.01,
    value_weight: float = 0.5,
    value_clip: float | None = None,
    kl_weight: float | Float[Array, ""] = 0.0,
) -> tuple[Float[Array, ""], LossTerms]:
    """The loss of proximal policy optimisation (Schulman et al., 2017).

        loss = -mean(min(r A, clip(r, 1 - ε, 1 + ε) A)) + c_v value - c_e entropy + β KL

    Args:
        policy: what is to learn.
        batch: its steps; advantages as they are to be used (see `normalised`).
        distribution: of its choices.
        clip: ε, above 0.
        entropy_weight: c_e, from 0.
        value_weight: c_v, from 0.
        value_clip: see `value_error`.
        kl_weight: β, of the penalty on the divergence (ibid., section 4), from 0; by all logits
            where the batch has them and the distribution knows how, or else by its estimate.
    """

    def objective(log_ratio: jax.Array, _: jax.Array) -> jax.Array:
        return clipped_surrogate(log_ratio, batch.advantage, clip)

    return _loss(
        policy, batch, distribution, objective, clip, entropy_weight, value_weight, value_clip,
        kl_weight,
    )  # fmt: skip


def a2c_loss(
    policy: Policy,
    batch: Batch,
    distribution: Distribution,
    *,
    entropy_weight: float | Float[Array, ""] = 0.01,
    value_weight: float = 0.5,
) -> tuple[Float[Array, ""], LossTerms]:
    """The loss of the advantage actor-critic (Mnih et al., 2016), for one step on fresh choices.

        loss = -mean(A log π(choice)) + c_v value - c_e entropy

    Args:
        policy: what is to learn; the one that made the choices.
        batch: its steps; returns of n steps are those of `gae` with trace 1.
        distribution: of its choices.
        entropy_weight: c_e, from 0.
        value_weight: c_v, from 0.
    """

    def objective(_: jax.Array, log_prob: jax.Array) -> jax.Array:
        return log_prob * batch.advantage

    return _loss(
        policy, batch, distribution, objective, None, entropy_weight, value_weight, None, 0.0
    )


def _loss(
    policy: Policy,
    batch: Batch,
    distribution: Distribution,
    objective: Callable[[jax.Array, jax.Array], jax.Array],
    clip: float | None,
    entropy_weight: float | jax.Array,
    value_weight: float,
    value_clip: float | None,
    kl_weight: float | jax.Array,
) -> tuple[jax.Array, LossTerms]:
    logits, values = jax.vmap(policy)(batch.graph)
    log_prob = jax.vmap(distribution.log_prob)(logits, batch.choice)
    log_ratio = log_prob - batch.log_prob
    by_example = jax.vmap(distribution.entropies)(logits)
    entropies = {head: jnp.mean(entropy) for head, entropy in by_example.items()}
    entropy = jnp.sum(jnp.stack(list(entropies.values())))
    kl = jnp.mean(approximate_kl(log_ratio))
    exact_kl = None
    if distribution.kl is not None and batch.logits is not None:
        exact_kl = jnp.mean(jax.vmap(distribution.kl)(batch.logits, logits))
    policy_loss = -jnp.mean(objective(log_ratio, log_prob))
    value_loss = jnp.mean(value_error(values, batch.value, batch.returns, value_clip))
    loss = policy_loss + value_weight * value_loss - entropy_weight * entropy
    # Not even 0 times a gradient where no penalty is asked for: 0 times infinity is NaN.
    if not isinstance(kl_weight, float) or kl_weight:
        loss += kl_weight * (kl if exact_kl is None else exact_kl)
    outside = jnp.zeros(()) if clip is None else _outside(log_ratio, clip)
    exact_kl = jnp.asarray(jnp.nan, kl.dtype) if exact_kl is None else exact_kl
    terms = LossTerms(loss, policy_loss, value_loss, entropy, entropies, kl, exact_kl, outside)
    return loss, jax.lax.stop_gradient(terms)


def _outside(log_ratio: jax.Array, clip: float) -> jax.Array:
    return jnp.mean((jnp.abs(jnp.expm1(log_ratio)) > clip).astype(log_ratio.dtype))

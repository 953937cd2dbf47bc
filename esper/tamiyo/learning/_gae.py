"""Advantages from rewards and estimated values: generalised advantage estimation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from esper.errors import InputError


class Advantages(NamedTuple):
    """What the actions were worth beyond what was expected, and what states were worth."""

    advantages: Float[Array, "time ..."]
    returns: Float[Array, "time ..."]
    """Targets of the value: advantages and values, added."""


def gae(
    rewards: Float[Array, "time ..."],
    values: Float[Array, "time ..."],
    dones: Bool[Array, "time ..."],
    bootstrap: Float[Array, "..."],
    discount: float,
    trace: float,
    *,
    truncated: Bool[Array, "time ..."] | None = None,
    final_values: Float[Array, "time ..."] | None = None,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al., 2016), over episodes that follow another.

        δ_t = r_t + γ v(s_{t+1}) - v(s_t)
        A_t = δ_t + γ λ A_{t+1}

    An environment that begins anew after an episode shows the next episode's first state where
    the last one of the ended episode was. So where `dones` says that an episode ended with the
    step, the state after it is worth nothing and A_{t+1} is left out. An episode that ended only
    because its time was up (`truncated`) is worth `final_values` still.

    With `trace` 1 the returns are the n-step returns of A2C (Mnih et al., 2016), with 0 those
    of one step.

    Args:
        rewards: of each step.
        values: estimated of the state before each step.
        dones: whether the episode ended with the step, for whatever reason.
        bootstrap: estimated of the state after the last step; where that is done, not looked at.
        discount: γ, from 0 to 1.
        trace: λ, from 0 to 1.
        truncated: which ends were for the time alone; only where `dones` is True too.
        final_values: estimated of the last state of episodes, looked at where truncated.

    Raises:
        InputError: for a discount or trace outside of [0, 1], and for shapes that differ.
    """
    for name, number in (("discount", discount), ("trace", trace)):
        if not 0.0 <= number <= 1.0:
            raise InputError(f"the {name} is from 0 to 1, and not {number}")
    _check_shapes(rewards, {"values": values, "dones": dones}, bootstrap)
    if (truncated is None) != (final_values is None):
        raise InputError("give truncated and final_values together, or neither of them")
    after = jnp.concatenate([values[1:], bootstrap[None]])
    after = jnp.where(dones, 0.0, after)
    if truncated is not None and final_values is not None:
        _check_shapes(rewards, {"truncated": truncated, "final_values": final_values}, bootstrap)
        after = jnp.where(dones & truncated, final_values, after)
    deltas = rewards + discount * after - values
    # Nothing is carried over the end of an episode, of whatever kind.
    decays = jnp.where(dones, 0.0, jnp.asarray(discount * trace, values.dtype))

    def back(later: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, decay = row
        advantage = delta + decay * later
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(bootstrap), (deltas, decays), reverse=True)
    return Advantages(advantages, advantages + values)


def _check_shapes(rewards: Any, columns: dict[str, Any], bootstrap: Any) -> None:
    for name, column in columns.items():
        if jnp.shape(column) != jnp.shape(rewards):
            raise InputError(
                f"{name} has the shape {jnp.shape(column)}; it is that of the rewards,"
                f" {jnp.shape(rewards)}: [time] or [time, envs]"
            )
    if not jnp.ndim(rewards) or jnp.shape(bootstrap) != jnp.shape(rewards)[1:]:
        raise InputError(
            f"the bootstrap has the shape {jnp.shape(bootstrap)}; one number for each environment"
            f" is expected, {jnp.shape(rewards)[1:]}"
        )


def normalised(advantages: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Advantages with mean 0 and standard deviation 1, or all 0 where they do not differ."""
    centred = advantages - jnp.mean(advantages)
    # Within rounding of each other is not to differ: else noise would be blown up to size 1.
    least = 1e-6 * jnp.maximum(jnp.max(jnp.abs(advantages)), 1e-6)
    spread = jnp.std(advantages)
    return jnp.where(spread > least, centred / jnp.maximum(spread, least), 0.0)


def explained_variance(
    values: Float[Array, "*batch"], returns: Float[Array, "*batch"]
) -> Float[Array, ""]:
    """The part of the returns' variance that the values tell: 1 for all of it, 0 for a constant.

    Below 0 the values are worse than a constant. NaN where the returns do not differ.
    """
    variance = jnp.var(returns)
    return jnp.where(variance > 0, 1.0 - jnp.var(returns - values) / variance, jnp.nan)

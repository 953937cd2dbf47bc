"""What a step of the gym earns: what was measured, against the twin that did nothing."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper.tamiyo.gym._growing import Measured
from esper.tolaria.worth import GROWTH_WEIGHTS, RENT, REWARD_COMPONENTS, Measurements


class Reward(NamedTuple):
    """Of one step; what the twin earned is taken off."""

    total: Any
    """f32 `[]`: the sum of all that follows."""
    components: dict[str, Any]
    """By the names of `REWARD_COMPONENTS`, weighted; and `rent`, not positive."""


def measurements(
    measured: Measured, first_loss: Any, losses: Any, *, flops: Any, parameters: Any, memory: Any,
    faults: Any, illegal: Any,
) -> Measurements:  # fmt: skip
    """As `esper.tolaria.worth.measure` has them of a run; what is illegal counts as a veto."""
    return Measurements(
        loss=measured.loss / first_loss,
        flops=flops,
        latency=jnp.ones(()),
        memory=memory,
        parameters=parameters,
        loss_spread=spread_of(losses),
        rollbacks=jnp.zeros(()),
        faults=faults,
        vetoes=illegal,
        novelty=measured.novelty,
        worth=measured.all_worth / first_loss,
        worth_spread=measured.all_worth_spread / first_loss,
        worth_spread_of_seeds=jnp.zeros(()),
    )


def of_host(loss: Any, first_loss: Any, losses: Any) -> Measurements:
    """The same of a bare host."""
    none, one = jnp.zeros(()), jnp.ones(())
    return Measurements(loss / first_loss, one, one, one, one, spread_of(losses), *([none] * 7))


def spread_of(losses: jax.Array) -> jax.Array:
    """Standard deviation of losses over their mean."""
    mean = jnp.abs(jnp.mean(losses))
    return jnp.where(mean > 0.0, jnp.std(losses) / jnp.where(mean > 0.0, mean, 1.0), 0.0)


def potentials(measurements: Measurements) -> dict[str, jax.Array]:
    """Of each component, weighted."""
    own = Measurements(*(jnp.asarray(value, jnp.float32) for value in measurements))
    return {
        name: GROWTH_WEIGHTS[name] * row.potential(own, jnp, "flops")
        for name, row in REWARD_COMPONENTS.items()
    }


def step_reward(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    twin_before: Mapping[str, Any],
    twin_after: Mapping[str, Any],
    flops: Any,
    boundaries: int,
) -> Reward:
    """What a step earned beyond the twin's.

    Each component is a difference of potentials (see `esper.tolaria.worth.reward`), so over an
    episode they add up to what the network is in the end beyond the twin, whatever the way to it.

    Args:
        before: potentials.
        flops: of a forward pass in that step, over the host's.
        boundaries: of an episode.
    """
    earned = {
        name: (after[name] - before[name]) - (twin_after[name] - twin_before[name])
        for name in REWARD_COMPONENTS
    }
    rent = -RENT / boundaries * jnp.log2(jnp.maximum(flops, 1.0))
    return Reward(sum(earned.values()) + rent, {**earned, "rent": rent})

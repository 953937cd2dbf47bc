"""Many environments, walked through at once by one policy."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from esper.tamiyo.learning._distribution import Distribution
from esper.tamiyo.learning._losses import Policy


class StepLike(Protocol):
    """What a step of an environment gives beside its state."""

    @property
    def graph(self) -> Any:
        """Of the state after; of the next episode's first where one ended."""
        ...

    @property
    def reward(self) -> jax.Array:
        """f32 `[]`."""
        ...

    @property
    def done(self) -> jax.Array:
        """Bool `[]`: whether the episode ended, so that nothing follows from its last state."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """f32 `[]` each; NaN where there is nothing to tell."""
        ...


class EnvironmentLike(Protocol):
    """One environment, pure; `jax.vmap` makes many. It begins anew by itself after an episode."""

    def reset(self, key: jax.Array, /) -> tuple[Any, Any]:
        """The first state, and its graph."""
        ...

    def step(self, state: Any, choice: Any, /) -> tuple[Any, StepLike]:
        """The state after a choice."""
        ...


class Walk(NamedTuple):
    """Where environments are; every leaf has the leading axis `[envs]`."""

    states: Any
    graphs: Any
    returned: Float[Array, " envs"]
    """The sum of rewards since the episode began."""
    taken: Int32[Array, " envs"]
    """Steps since the episode began."""


class Steps(NamedTuple):
    """What was done and what came of it; every leaf has the leading axes `[steps, envs]`."""

    graph: Any
    """Of the state before."""
    choice: Any
    logits: Any
    """None where the distribution knows no exact divergence."""
    log_prob: Float[Array, "steps envs"]
    value: Float[Array, "steps envs"]
    reward: Float[Array, "steps envs"]
    done: Bool[Array, "steps envs"]
    returned: Float[Array, "steps envs"]
    """The sum of rewards since the episode began, with this one."""
    taken: Int32[Array, "steps envs"]
    """Steps since the episode began, with this one."""
    info: dict[str, Any]


def begin(environment: EnvironmentLike, envs: int, key: jax.Array) -> Walk:
    """So many environments at the beginning of an episode each."""
    states, graphs = jax.vmap(environment.reset)(jax.random.split(key, envs))
    return Walk(states, graphs, jnp.zeros(envs), jnp.zeros(envs, jnp.int32))


def rollout(
    environment: EnvironmentLike,
    policy: Policy,
    distribution: Distribution,
    walk: Walk,
    steps: int,
    key: jax.Array,
) -> tuple[Walk, Steps]:
    """Let a policy choose so many times in each environment.

    Args:
        environment: of all of them.
        policy: what chooses.
        distribution: by which its choices are drawn.
        walk: where they are.
        steps: from 1.
        key: of the draws.
    """
    envs = len(walk.returned)

    def one(walk: Walk, key: jax.Array) -> tuple[Walk, Steps]:
        logits, value = jax.vmap(policy)(walk.graphs)
        choice = jax.vmap(distribution.sample)(logits, jax.random.split(key, envs))
        log_prob = jax.vmap(distribution.log_prob)(logits, choice)
        states, step = jax.vmap(environment.step)(walk.states, choice)
        returned, taken = walk.returned + step.reward, walk.taken + 1
        after = Walk(
            states, step.graph, jnp.where(step.done, 0.0, returned), jnp.where(step.done, 0, taken)
        )
        kept = None if distribution.kl is None else logits
        return after, Steps(
            walk.graphs, choice, kept, log_prob, value, step.reward, step.done, returned, taken,
            step.info,
        )  # fmt: skip

    return jax.lax.scan(one, walk, jax.random.split(key, steps))

"""A trained policy in the gym, as it would act in a run."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from esper.tamiyo.gym._controlled import Choosing
from esper.tamiyo.gym._environment import Environment
from esper.tamiyo.gym._state import State
from esper.tamiyo.policy import Choice, LoadedPolicy


def advised(environment: Environment, loaded: LoadedPolicy) -> Choosing:
    """What a policy advises: its likeliest choice, or to wait where it is not sure."""
    see = jax.jit(jax.vmap(environment.graph))

    def choosing(boundary: int, state: State) -> Sequence[Choice]:
        graphs = jax.tree.map(np.asarray, see(state))
        advice = loaded.decide_many(graphs)
        columns = zip(*(own.choice for own in advice), strict=True)
        return [Choice(*(jnp.asarray(own, jnp.int32) for own in columns))]

    return choosing

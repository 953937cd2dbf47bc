"""What a controller did in the gym, as examples to clone."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.tamiyo.gym import Environment, State
from esper.tamiyo.gym._controlled import Choosing, play
from esper.tamiyo.learning._offline import Recorded
from esper.tamiyo.policy import Choice


def demonstrations(
    environment: Environment, key: jax.Array, episodes: int, choosing: Choosing
) -> Recorded:
    """Play episodes, and record each boundary's graph, what was chosen, and what came of it.

    Where several changes were made at one boundary, the first is what is recorded.

    Args:
        episodes: how many, from 1.

    Returns:
        Leaves `[examples, ...]`; returns are the rewards from there to the episode's end.
    """
    graphs, choices, until = list[Any](), list[Choice](), list[np.ndarray]()
    see = jax.jit(jax.vmap(environment.graph))
    still = Choice(*(np.zeros(episodes, np.int32) for _ in Choice._fields))

    def watched(boundary: int, state: State) -> Sequence[Choice]:
        wanted = choosing(boundary, state)
        graphs.append(jax.tree.map(np.asarray, see(state)))
        first = wanted[0] if wanted else still
        choices.append(Choice(*(np.asarray(own, np.int32) for own in first)))
        until.append(np.asarray(state.returned))
        return wanted

    played = play(environment, key, episodes, watched)
    returns = [played.returned - before for before in until]

    def joined(*own: Any) -> Any:
        return jnp.asarray(np.concatenate(own))

    return Recorded(
        jax.tree.map(joined, *graphs),
        jax.tree.map(joined, *choices),
        joined(*(own.astype(np.float32) for own in returns)),
    )

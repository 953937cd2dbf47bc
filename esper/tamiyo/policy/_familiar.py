"""Whether a network is like any that a policy was trained on."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esper.tamiyo.graph import NODE_FEATURES, RUN_FEATURES, ModelGraph

_FLOOR = 0.1
"""Standard deviation, at least: what hardly varied in training may vary by so much."""


class Familiar(NamedTuple):
    """Means and spreads of what was seen in training."""

    mean: Any
    """f32 `[summary]`."""
    spread: Any
    """f32 `[summary]`: standard deviations, from 0.1."""
    threshold: Any
    """f32 `[]`: a distance that hardly anything had that was seen."""


SUMMARY = (
    *RUN_FEATURES,
    *(f"mean_{name}" for name in NODE_FEATURES),
    *(f"most_{name}" for name in NODE_FEATURES),
)
"""What a network is summarised by, by name."""


def summary(graph: ModelGraph) -> Float[Array, " summary"]:
    """A network of any size in one vector: its run, and its sites' means and maxima."""
    there = jnp.asarray(graph.edges.there)[:, None]
    count = jnp.maximum(jnp.sum(there.astype(jnp.float32)), 1.0)
    nodes = jnp.asarray(graph.nodes)
    mean = jnp.sum(jnp.where(there, nodes, 0.0), axis=0) / count
    most = jnp.max(jnp.where(there, nodes, -jnp.inf), axis=0)
    return jnp.concatenate([jnp.asarray(graph.run), mean, jnp.where(jnp.isfinite(most), most, 0.0)])


def distances(familiar: Familiar, graph: ModelGraph) -> Float[Array, " summary"]:
    """How many standard deviations each number is off."""
    return jnp.abs(summary(graph) - familiar.mean) / familiar.spread


def distance(familiar: Familiar, graph: ModelGraph) -> Float[Array, ""]:
    """How unlike all that was seen, over the threshold: above 1 is unlike.

    The largest of `distances`, so that one number that was never met is enough, however many there
    are that were.
    """
    return jnp.max(distances(familiar, graph)) / familiar.threshold


def learn_familiar(summaries: np.ndarray, others: np.ndarray, *, quantile: float = 0.999,
                   margin: float = 1.25) -> Familiar:  # fmt: skip
    """What is familiar.

    Args:
        summaries: f32 `[networks, summary]`, seen in training.
        others: the same of others of their kind, which set the threshold.
        quantile: of the others, that are to be within it.
        margin: how far beyond it begins what is unlike.
    """
    mean = summaries.mean(axis=0)
    spread = np.maximum(summaries.std(axis=0), _FLOOR)
    found = np.max(np.abs(others - mean) / spread, axis=1)
    limit = margin * float(np.quantile(found, quantile))
    return Familiar(*(np.asarray(own, np.float32) for own in (mean, spread, limit)))

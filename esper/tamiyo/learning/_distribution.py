"""What there is to know of a distribution over choices, as functions of a policy's logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Distribution:
    """How choices are drawn from logits, and how likely they are; all of one, for `jax.vmap`.

    A policy is any function `graph -> (logits, value)`; what its logits are is known here alone.
    """

    sample: Callable[[Any, jax.Array], Any]
    """`(logits, key) -> choice`."""
    log_prob: Callable[[Any, Any], jax.Array]
    """`(logits, choice) -> f32 []`."""
    entropies: Callable[[Any], dict[str, jax.Array]]
    """`logits -> f32 []` of each head, in nats. They add up to the entropy of the choice: a head
    that is not always asked counts by the probability that it is."""
    kind: Callable[[Any], jax.Array]
    """`choice -> i32 []`, an index into `kinds`."""
    kinds: tuple[str, ...]
    """Names of the kinds of choices."""
    kl: Callable[[Any, Any], jax.Array] | None = None
    """`(logits, others) -> f32 []`, the Kullback-Leibler divergence KL(logits ‖ others), exactly;
    None where that would take too long."""

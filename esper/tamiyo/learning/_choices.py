"""The choices of `esper.tamiyo.policy`, as learning takes them."""

import jax
import jax.numpy as jnp

from esper.tamiyo.learning._distribution import Distribution
from esper.tamiyo.policy import Choice, Kind, Logits, entropies, log_prob, sample


def choice_kl(logits: Logits, others: Logits) -> jax.Array:
    """KL(logits ‖ others) in nats, f32 `[]`, exactly: by the chain rule, head by head.

    What is legal must be the same for both.
    """
    kind, site = jax.nn.softmax(logits.kind), jax.nn.softmax(logits.site)
    seed = jax.nn.softmax(logits.seed)
    asked = kind[1:, None] * site
    return (
        _divergence(logits.kind, others.kind)
        + jnp.sum(kind[1:] * _divergence(logits.site, others.site))
        + jnp.sum(asked[0] * _divergence(logits.kernel, others.kernel))
        + jnp.sum(asked[1:] * _divergence(logits.seed, others.seed))
        + jnp.sum(asked[3][:, None] * seed[2] * _divergence(logits.alpha, others.alpha))
    )


def _divergence(logits: jax.Array, others: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logs) * (logs - jax.nn.log_softmax(others)), axis=-1)


def _kind(choice: Choice) -> jax.Array:
    return choice.kind


CHOICES = Distribution(
    sample, log_prob, entropies, _kind, tuple(kind.name.lower() for kind in Kind), choice_kl
)
"""Of a `Policy` over model graphs."""

"""What a policy may choose at a boundary, and how likely it is to.

A choice is made head by head, each given those before it: what to do, at which site, and there
with which kernel or seed. So its probability is a product, the heads' number grows with
the number of sites and not with that of choices, and what lifecycle or candidates forbid has
probability 0 in its own head.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper.tamiyo.graph import Legal


class Kind(IntEnum):
    """What to do."""

    WAIT = 0
    GRAFT = 1
    UNLOAD = 2
    FOSSILIZE = 3
    RETARGET = 4


ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where RETARGET may let the alpha of a seed run to."""

MASKED = -1e9
"""The logit of what is not legal: finite, so that no gradient is NaN; its probability is 0."""


class Choice(NamedTuple):
    """One for each boundary; i32 `[]` each, and 0 where the kind has no use for it."""

    kind: Any
    node: Any
    seed: Any
    kernel: Any
    alpha: Any
    """Index into `ALPHAS`."""


class Logits(NamedTuple):
    """Of each head; `MASKED` where a choice is not legal. WAIT always is."""

    kind: Any
    """f32 `[5]`."""
    site: Any
    """f32 `[4, nodes]`: for GRAFT, UNLOAD, FOSSILIZE and RETARGET."""
    kernel: Any
    """f32 `[nodes, kernels]`: for GRAFT."""
    seed: Any
    """f32 `[3, nodes, seeds]`: for UNLOAD, FOSSILIZE and RETARGET."""
    alpha: Any
    """f32 `[nodes, seeds, 5]`: for RETARGET."""


def masked(logits: Logits, legal: Legal) -> Logits:
    """The logits with all masked that is not legal."""
    graft, unload, fossilize, retarget = map(jnp.asarray, legal[:4])
    sites = jnp.stack([jnp.any(own, axis=1) for own in (graft, unload, fossilize, retarget)])
    kinds = jnp.concatenate([jnp.ones(1, jnp.bool_), jnp.any(sites, axis=1)])
    return Logits(
        jnp.where(kinds, logits.kind, MASKED),
        jnp.where(sites, logits.site, MASKED),
        jnp.where(graft, logits.kernel, MASKED),
        jnp.where(jnp.stack([unload, fossilize, retarget]), logits.seed, MASKED),
        jnp.where(retarget[..., None], logits.alpha, MASKED),
    )


def _follow(logits: Logits, pick: Any) -> Choice:
    """Ask the heads in their order; `pick(head, logits)` takes one of the last axis."""
    kind = pick(0, logits.kind)
    node = jnp.where(kind > Kind.WAIT, pick(1, logits.site[jnp.maximum(kind - 1, 0)]), 0)
    kernel = jnp.where(kind == Kind.GRAFT, pick(2, logits.kernel[node]), 0)
    seed = pick(3, logits.seed[jnp.maximum(kind - Kind.UNLOAD, 0), node])
    seed = jnp.where(kind >= Kind.UNLOAD, seed, 0)
    alpha = jnp.where(kind == Kind.RETARGET, pick(4, logits.alpha[node, seed]), 0)
    return Choice(*(own.astype(jnp.int32) for own in (kind, node, seed, kernel, alpha)))


def best(logits: Logits) -> Choice:
    """The most likely of each head in turn; of equals the first."""
    return _follow(logits, lambda _, own: jnp.argmax(own))


def sample(logits: Logits, key: jax.Array) -> Choice:
    """One by its probability."""
    keys = jax.random.split(key, 5)
    return _follow(logits, lambda head, own: jax.random.categorical(keys[head], own))


def log_prob(logits: Logits, choice: Choice) -> jax.Array:
    """The logarithm of a choice's probability, f32 `[]`; about `MASKED` for an illegal one."""
    kind, node, seed, kernel, alpha = choice
    own = jax.nn.log_softmax
    found = own(logits.kind)[kind]
    at = own(logits.site[jnp.maximum(kind - 1, 0)])[node]
    with_kernel = own(logits.kernel[node])[kernel]
    at_seed = own(logits.seed[jnp.maximum(kind - Kind.UNLOAD, 0), node])[seed]
    to_alpha = own(logits.alpha[node, seed])[alpha]
    found += jnp.where(kind > Kind.WAIT, at, 0.0)
    found += jnp.where(kind == Kind.GRAFT, with_kernel, 0.0)
    found += jnp.where(kind >= Kind.UNLOAD, at_seed, 0.0)
    return found + jnp.where(kind == Kind.RETARGET, to_alpha, 0.0)


def entropies(logits: Logits) -> dict[str, jax.Array]:
    """The entropy of each head, in nats, times the probability that it is asked.

    Their sum is the entropy of the choice, by the chain rule.
    """
    kind, site = jax.nn.softmax(logits.kind), jax.nn.softmax(logits.site)
    seed = jax.nn.softmax(logits.seed)
    asked = kind[1:, None] * site
    return {
        "kind": _entropy(logits.kind),
        "site": jnp.sum(kind[1:] * _entropy(logits.site)),
        "kernel": jnp.sum(asked[0] * _entropy(logits.kernel)),
        "seed": jnp.sum(asked[1:] * _entropy(logits.seed)),
        "alpha": jnp.sum(asked[3][:, None] * seed[2] * _entropy(logits.alpha)),
    }


def _entropy(logits: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(logs) * logs, axis=-1)

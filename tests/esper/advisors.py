"""Small policies for tests, as controllers ask them."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from esper.tamiyo.graph import ModelGraph
from esper.tamiyo.policy import Choice, Kind, Policy, best, make_policy


@eqx.filter_jit
def _choose(policy: Policy, graph: ModelGraph):
    logits, value = policy(graph)
    return best(logits), value


class SmallAdvice(NamedTuple):
    """An `Advice`."""

    choice: Choice
    remark: str = ""
    confidence: float = 0.75
    epistemic: float = 0.3
    aleatoric: float = 0.4
    effect: tuple[float, float, float] = (0.2, -0.1, 0.5)
    reasons: tuple[tuple[str, float], ...] = (("progress", 0.5), ("site_depth", -0.25))


WAITING = Choice(0, 0, 0, 0, 0)


class SmallAdvisor:
    """A policy that learned nothing, with leanings."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def decide(self, graph: ModelGraph) -> SmallAdvice:
        choice, value = _choose(self.policy, graph)
        own = float(value)
        return SmallAdvice(choice, effect=(own, own - 0.5, own + 0.5))


@functools.cache
def _small_policy(seed: int) -> Policy:
    # Drawn in one program: each shape by itself would be compiled by itself.
    make = eqx.filter_jit(lambda key: make_policy(key, width=8, rounds=1, heads=2))
    return make(jax.random.key(seed))


def small_advisor(leanings: Mapping[str, float], *, seed: int = 0) -> SmallAdvisor:
    """A new policy.

    Args:
        leanings: added to the logits of kinds, by name.
    """
    bias = jnp.array([leanings.get(kind.name.lower(), 0.0) for kind in Kind])
    return SmallAdvisor(eqx.tree_at(lambda own: own.kind.bias, _small_policy(seed), bias))

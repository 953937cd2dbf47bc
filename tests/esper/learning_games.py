"""Small games whose best play is known, and policies for them, in the form that learning takes."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from esper.tamiyo.learning import Distribution

ARMS = 3


class Choice(NamedTuple):
    """To wait, or to pull one of the arms."""

    kind: jax.Array
    arm: jax.Array


class Logits(NamedTuple):
    kind: jax.Array
    arm: jax.Array


def sample(logits: Logits, key: jax.Array) -> Choice:
    one, two = jax.random.split(key)
    kind = jax.random.categorical(one, logits.kind)
    arm = jax.random.categorical(two, logits.arm)
    return Choice(kind, jnp.where(kind == 1, arm, 0))


def log_prob(logits: Logits, choice: Choice) -> jax.Array:
    of_kind = jax.nn.log_softmax(logits.kind)[choice.kind]
    of_arm = jax.nn.log_softmax(logits.arm)[choice.arm]
    return of_kind + jnp.where(choice.kind == 1, of_arm, 0.0)


def _entropy(logits: jax.Array) -> jax.Array:
    return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits))


def _divergence(logits: jax.Array, others: jax.Array) -> jax.Array:
    gap = jax.nn.log_softmax(logits) - jax.nn.log_softmax(others)
    return jnp.sum(jax.nn.softmax(logits) * gap)


def entropies(logits: Logits) -> dict[str, jax.Array]:
    asked = jax.nn.softmax(logits.kind)[1]
    return {"kind": _entropy(logits.kind), "arm": asked * _entropy(logits.arm)}


def kl(logits: Logits, others: Logits) -> jax.Array:
    asked = jax.nn.softmax(logits.kind)[1]
    return _divergence(logits.kind, others.kind) + asked * _divergence(logits.arm, others.arm)


PULLS = Distribution(sample, log_prob, entropies, lambda choice: choice.kind, ("wait", "pull"), kl)


class Table(eqx.Module):
    """Logits and a value for each of a few states."""

    kind: jax.Array
    arm: jax.Array
    value: jax.Array

    def __call__(self, state: jax.Array) -> tuple[Logits, jax.Array]:
        return Logits(self.kind[state], self.arm[state]), self.value[state]


def table(states: int, key: int | None = None) -> Table:
    shapes = [(states, 2), (states, ARMS), (states,)]
    if key is None:
        return Table(*(jnp.zeros(shape) for shape in shapes))
    keys = jax.random.split(jax.random.key(key), 3)
    return Table(*(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)))


class Step(NamedTuple):
    graph: Any
    reward: jax.Array
    done: jax.Array
    info: dict[str, jax.Array]


class Bandit(NamedTuple):
    """One choice an episode: waiting gives 0, arm i gives i - 1 and noise. The best is arm 2."""

    noise: float = 0.5

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return key, jnp.zeros((), jnp.int32)

    def step(self, key: jax.Array, choice: Choice) -> tuple[jax.Array, Step]:
        key, used = jax.random.split(key)
        mean = choice.arm.astype(jnp.float32) - 1.0
        reward = mean + self.noise * jax.random.normal(used)
        reward = jnp.where(choice.kind == 1, reward, 0.0)
        state = jnp.zeros((), jnp.int32)
        return key, Step(
            state, reward, jnp.ones((), bool), {"pulled": choice.kind.astype(jnp.float32)}
        )


class Chain(NamedTuple):
    """A walk that pays at its end alone: arm 0 goes on and costs 0.1, all else goes back to 0.

    Who goes on `length` times in a row gets 1; an episode ends then, or after twice as many steps.
    """

    length: int = 4

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        return jnp.zeros(2, jnp.int32), jnp.zeros((), jnp.int32)

    def step(self, state: jax.Array, choice: Choice) -> tuple[jax.Array, Step]:
        on = (choice.kind == 1) & (choice.arm == 0)
        at = jnp.where(on, state[0] + 1, 0)
        arrived = at == self.length
        reward = jnp.where(arrived, 1.0, 0.0) - jnp.where(on, 0.1, 0.0)
        done = arrived | (state[1] + 1 >= 2 * self.length)
        after = jnp.where(done, 0, jnp.stack([at, state[1] + 1]))
        return after, Step(after[0], reward, done, {"arrived": arrived.astype(jnp.float32)})

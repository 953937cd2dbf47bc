"""What a choice would bring, and how sure one can be of it.

The effect of a choice is what it earns by itself: the rewards to the end of the episode with it and
nothing after it, less those with nothing at all. The gym measures it, by playing both from the same
state with the same randomness.

Two kinds of not knowing are kept apart. What differs between states that look alike is aleatoric:
each estimate has a variance of its own, learned with its mean (Nix and Weigend, 1994). What
other data might have taught is epistemic: how far the estimates of several networks are apart.
Those are an ensemble, trained on resampled data (Lakshminarayanan et al., 2017) with fixed drawn
functions added, so that they differ where there was nothing to learn from (Osband et al., 2018); or
one network of which units are left out at random (Gal and Ghahramani, 2016), by masks that are
always the same, so that the same state gets the same answer.
"""

from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esper.errors import InputError
from esper.tamiyo.policy._choice import ALPHAS, Choice, Kind
from esper.tamiyo.policy._policy import Embedded

Method = Literal["ensemble", "dropout"]
MEMBERS = 5
PASSES = 16
"""Of a network with dropout."""
_DROPPED = 0.1
_HIDDEN = 64
_PRIOR = 1.0
_LEAST, _MOST = -6.0, 3.0
"""Of the logarithm of a variance, in units of the effects' own."""


class Estimate(NamedTuple):
    """What a choice would bring; f32 `[]` each."""

    effect: Any
    """Mean, in units of the reward."""
    epistemic: Any
    """Standard deviation between networks."""
    aleatoric: Any
    """Standard deviation within them."""
    probability: Any
    """That the effect is above 0, calibrated; 1 for waiting, which does nothing for sure."""

    @property
    def spread(self) -> Any:
        """Standard deviation of the effect, for all reasons."""
        return jnp.sqrt(jnp.square(self.epistemic) + jnp.square(self.aleatoric))


class _Member(eqx.Module):
    """One network: the mean and the logarithm of the variance, both in units of `scale`."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, inputs: int, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(inputs, _HIDDEN, key=keys[0])
        self.second = eqx.nn.Linear(_HIDDEN, _HIDDEN, key=keys[1])
        self.last = eqx.nn.Linear(_HIDDEN, 2, key=keys[2])

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        h = jax.nn.relu(self.first(x))
        h = jax.nn.relu(self.second(_thinned(h, key, 0)))
        return self.last(_thinned(h, key, 1))


def _thinned(h: jax.Array, key: jax.Array | None, layer: int) -> jax.Array:
    if key is None:
        return h
    kept = jax.random.bernoulli(jax.random.fold_in(key, layer), 1.0 - _DROPPED, h.shape)
    return jnp.where(kept, h / (1.0 - _DROPPED), 0.0)


class Effects(eqx.Module):
    """Estimates of effects, from what a policy makes of a graph."""

    members: _Member
    """Stacked; of one network where the method is dropout."""
    priors: _Member
    """Never trained; as many."""
    scale: Float[Array, ""]
    """Standard deviation of the effects that were learned from."""
    slope: Float[Array, ""]
    """Of the calibration (Platt, 1999): p -> sigmoid(slope · logit p + shift)."""
    shift: Float[Array, ""]
    width: int = eqx.field(static=True)
    method: Method = eqx.field(static=True)

    def outputs(
        self, embedded: Embedded, choice: Choice, key: jax.Array | None = None
    ) -> Float[Array, "networks 2"]:
        """Mean and logarithm of the variance by each network, in units of `scale`.

        Args:
            key: of units left out in training, with dropout; None for no such.
        """
        x = _inputs(embedded, choice)
        if self.method == "dropout":
            one: Any = jax.tree.map(lambda leaf: leaf[0], self.members)
            keys = _masks() if key is None else key[None]
            return jax.vmap(lambda own: _bounded(one(x, own)))(keys)
        own = eqx.filter_vmap(lambda member: member(x))(self.members)
        prior = eqx.filter_vmap(lambda member: member(x))(self.priors)
        prior = jax.lax.stop_gradient(prior)
        return _bounded(own.at[:, 0].add(_PRIOR * prior[:, 0]))

    def __call__(self, embedded: Embedded, choice: Choice) -> Estimate:
        """Of one choice; the same for the same arguments."""
        found = self.outputs(embedded, choice)
        means, variances = found[:, 0], jnp.exp(found[:, 1])
        spread = jnp.std(means)
        within = jnp.sqrt(jnp.mean(variances))
        mean = jnp.mean(means)
        # Of a mixture of normal distributions, one for each network.
        above = jnp.mean(jax.scipy.stats.norm.cdf(means / jnp.sqrt(variances)))
        above = jnp.clip(above, 1e-4, 1.0 - 1e-4)
        logit = self.slope * (jnp.log(above) - jnp.log1p(-above)) + self.shift
        waits = jnp.asarray(choice.kind) == Kind.WAIT
        return Estimate(
            jnp.where(waits, 0.0, mean * self.scale),
            jnp.where(waits, 0.0, spread * self.scale),
            jnp.where(waits, 0.0, within * self.scale),
            jnp.where(waits, 1.0, jax.nn.sigmoid(logit)),
        )


def make_effects(
    key: jax.Array, width: int, *, method: Method = "ensemble", members: int = MEMBERS
) -> Effects:
    """Estimates before anything was learned.

    Args:
        width: of the policy whose embeddings they are to be made from.
        members: of an ensemble, from 2.

    Raises:
        InputError: for an unknown method, or an ensemble of one.
    """
    if method not in get_args(Method):
        raise InputError(
            f"unknown method {method!r} to tell what is not known: expected one of"
            f" {', '.join(get_args(Method))}"
        )
    if method == "ensemble" and members < 2:
        raise InputError(f"an ensemble has at least 2 members, got {members}: one never disagrees")
    count = members if method == "ensemble" else 1
    inputs = 3 * width + len(Kind) + len(ALPHAS)
    one, other = jax.random.split(key)

    def stacked(key: jax.Array) -> _Member:
        return eqx.filter_vmap(lambda own: _Member(inputs, own))(jax.random.split(key, count))

    unit, none = jnp.ones(()), jnp.zeros(())
    return Effects(stacked(one), stacked(other), unit, unit, none, width, method)


def effect_loss(
    effects: Effects,
    embedded: Embedded,
    choice: Choice,
    effect: Float[Array, ""],
    weights: Float[Array, " networks"],
    key: jax.Array | None = None,
) -> Float[Array, ""]:
    """The negative logarithm of a measured effect's likelihood, in nats but for a constant.

    Args:
        embedded: of the policy, which does not learn from it.
        effect: as measured, in units of the reward.
        weights: how often each network sees this example, as of resampled data.
        key: of units left out.
    """
    found = effects.outputs(jax.lax.stop_gradient(embedded), choice, key)
    gap = effect / effects.scale - found[:, 0]
    losses = 0.5 * (jnp.square(gap) * jnp.exp(-found[:, 1]) + found[:, 1])
    return jnp.mean(weights * losses)


def _bounded(outputs: jax.Array) -> jax.Array:
    return outputs.at[..., 1].set(jnp.clip(outputs[..., 1], _LEAST, _MOST))


def _masks() -> jax.Array:
    return jax.random.split(jax.random.key(0), PASSES)


def _inputs(embedded: Embedded, choice: Choice) -> jax.Array:
    """The whole, the site, and what is grafted into it or done to."""
    kind = jnp.asarray(choice.kind)
    detail = jnp.where(
        kind == Kind.GRAFT,
        embedded.kernels[choice.kernel],
        embedded.seed(choice.node, choice.seed),
    )
    alpha = jax.nn.one_hot(choice.alpha, len(ALPHAS))
    alpha = jnp.where(kind == Kind.RETARGET, alpha, 0.0)
    kinds = jax.nn.one_hot(kind, len(Kind))
    return jnp.concatenate([embedded.whole, embedded.nodes[choice.node], detail, kinds, alpha])

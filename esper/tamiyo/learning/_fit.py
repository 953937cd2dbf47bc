"""Learning from what others did: cloning at first, and tuning by what a store holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper.errors import InputError
from esper.tamiyo._check import require
from esper.tamiyo.learning._choices import CHOICES
from esper.tamiyo.learning._distribution import Distribution
from esper.tamiyo.learning._losses import Policy
from esper.tamiyo.learning._offline import (
    OfflineTerms,
    Recorded,
    awr_loss,
    clone_loss,
    with_returns,
)
from esper.tamiyo.learning._replay import ReplayStore, Transition
from esper.tamiyo.learning._settings import require_settings


@dataclass(frozen=True)
class CloneSettings:
    """How a policy learns to do what was done.

    Raises:
        InputError: for a value outside of its range, by its name.
    """

    epochs: int = 10
    """How often each example is learnt from."""
    batch: int = 256
    """Examples of an update; all of them where there are fewer."""
    value_weight: float = 0.5
    """From 0: of the values' half squared error."""
    rate: float = 1e-3
    """Of Adam, from 0."""
    most_gradient: float = 1.0
    """The gradient's norm at most, from 0."""

    def __post_init__(self) -> None:
        positive = ("value_weight", "rate", "most_gradient")
        require_settings(self, ("epochs", "batch"), positive=positive)


@dataclass(frozen=True)
class OfflineSettings:
    """How a policy learns from a store; see `awr_loss`.

    Raises:
        InputError: for a value outside of its range, by its name.
    """

    updates: int = 1000
    batch: int = 256
    """Transitions of an update."""
    temperature: float = 1.0
    """In units of the returns, from 1e-6."""
    most: float = 20.0
    """What one choice counts at most, from 1."""
    value_weight: float = 0.5
    """From 0."""
    discount: float = 0.99
    """From 0 to 1; for transitions whose returns are to be estimated."""
    correction: float = 0.4
    """β of the importance weights, from 0 to 1; see `ReplayStore.draw`."""
    rate: float = 3e-4
    """Of Adam, from 0."""
    most_gradient: float = 1.0
    """The gradient's norm at most, from 0."""

    def __post_init__(self) -> None:
        positive = ("value_weight", "rate", "most_gradient")
        require_settings(self, ("updates", "batch"), ("discount", "correction"), positive)
        require("temperature of learning", self.temperature, 1e-6)
        require("most of learning", self.most, 1.0)


class Fitted(NamedTuple):
    """A policy that was fitted, and how its loss went."""

    policy: Any
    losses: np.ndarray
    """f32 `[updates]`."""
    likelihoods: np.ndarray
    """f32 `[updates]`: the geometric mean of the probabilities of what was done."""


def pretrain(
    policy: Policy,
    data: Recorded,
    settings: CloneSettings,
    key: jax.Array,
    *,
    distribution: Distribution = CHOICES,
) -> Fitted:
    """Behaviour cloning: let a policy learn to choose as was chosen.

    Args:
        policy: where it begins; an Equinox module.
        data: what was done, every leaf with the leading axis `[examples]`.
        settings: how.
        key: of the order of the examples.
        distribution: of choices.

    Raises:
        InputError: where there is no example.
    """
    count = len(data.returns)
    if not count:
        raise InputError("there is no example to clone: record some choices first")
    data = jax.tree.map(jnp.asarray, data)
    size = min(settings.batch, count)
    parts = -(-count // size)

    def loss(policy: Policy, part: Recorded) -> tuple[jax.Array, OfflineTerms]:
        return clone_loss(policy, part, distribution, value_weight=settings.value_weight)

    fit = _Fit(policy, loss, settings.rate, settings.most_gradient)

    @jax.jit
    def epoch(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        order = jax.random.permutation(key, count)
        # The last part is filled up by those of the first.
        rows = jnp.concatenate([order, order[: parts * size - count]]).reshape(parts, size)

        def one(carry: Any, rows: jax.Array) -> tuple[Any, Any]:
            carry, terms = fit.update(carry, (jax.tree.map(lambda leaf: leaf[rows], data),))
            return carry, (terms.loss, terms.likelihood)

        return jax.lax.scan(one, carry, rows)

    carry, found = fit.start, []
    for own in jax.random.split(key, settings.epochs):
        carry, measured = epoch(carry, own)
        found.append(jax.device_get(measured))
    losses, likelihoods = (np.concatenate(column) for column in zip(*found, strict=True))
    return Fitted(fit.policy(carry), losses, likelihoods)


def fine_tune_offline(
    policy: Policy,
    store: ReplayStore,
    settings: OfflineSettings,
    *,
    distribution: Distribution = CHOICES,
    enough: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Advantage-weighted regression on what a store holds (Peng et al., 2019).

    Priorities become the sizes of the advantages. Returns are those of `Recorded` examples, or for
    each `Transition` the reward and the discounted value of what it led to, by the present policy.

    Args:
        policy: where it begins; an Equinox module.
        store: of either; its draws decide what is learnt from.
        settings: how.
        distribution: of choices.
        enough: is asked before each update whether to end now, for instance as time is up.

    Raises:
        InputError: for an empty store, and one that holds something else.
    """

    def loss(policy: Policy, kept: Any, weights: jax.Array) -> tuple[jax.Array, OfflineTerms]:
        return awr_loss(
            policy,
            with_returns(policy, kept, settings.discount),
            distribution,
            temperature=settings.temperature,
            most=settings.most,
            value_weight=settings.value_weight,
            weights=weights,
        )

    fit = _Fit(policy, loss, settings.rate, settings.most_gradient)
    update = jax.jit(fit.update)
    carry, losses, likelihoods = fit.start, [], []
    for _ in range(settings.updates):
        if enough():
            break
        drawn = store.draw(settings.batch, correction=settings.correction)
        if not isinstance(drawn.transitions, Recorded | Transition):
            raise InputError(
                f"the store holds {type(drawn.transitions).__name__}; what can be learnt from is"
                " Recorded, with returns, or Transition"
            )
        carry, terms = update(carry, (drawn.transitions, drawn.weights))
        surprise = np.abs(np.asarray(terms.advantages, np.float64))
        store.update(drawn.serials, np.where(np.isfinite(surprise), surprise, 0.0))
        losses.append(terms.loss)
        likelihoods.append(terms.likelihood)
    return Fitted(
        fit.policy(carry), np.array(losses, np.float32), np.array(likelihoods, np.float32)
    )


class _Fit:
    """Adam on a loss of a policy; an update that is not finite changes nothing."""

    def __init__(
        self,
        policy: Policy,
        loss: Callable[..., tuple[jax.Array, OfflineTerms]],
        rate: float,
        most_gradient: float,
    ) -> None:
        params, self._static = eqx.partition(policy, eqx.is_inexact_array)
        self._loss = loss
        self._optimiser = optax.chain(optax.clip_by_global_norm(most_gradient), optax.adam(rate))
        self.start = params, self._optimiser.init(params)

    def policy(self, carry: Any) -> Any:
        return eqx.combine(carry[0], self._static)

    def update(self, carry: Any, given: tuple[Any, ...]) -> tuple[Any, OfflineTerms]:
        params, opt_state = carry

        def loss(params: Any) -> tuple[jax.Array, OfflineTerms]:
            return self._loss(eqx.combine(params, self._static), *given)

        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            finite = jnp.isfinite(optax.tree.norm(gradient))
            steps, following = self._optimiser.update(gradient, opt_state, params)
            new = optax.apply_updates(params, steps), following
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, carry), terms

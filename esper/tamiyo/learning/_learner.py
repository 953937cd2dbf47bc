"""Learning from own steps: one iteration of PPO or A2C as one program."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from esper.tamiyo.learning._choices import CHOICES
from esper.tamiyo.learning._distribution import Distribution
from esper.tamiyo.learning._gae import explained_variance, gae, normalised
from esper.tamiyo.learning._losses import Batch, LossTerms, Policy, a2c_loss, ppo_loss
from esper.tamiyo.learning._rollout import EnvironmentLike, Steps, Walk, begin, rollout
from esper.tamiyo.learning._settings import Decay, LearningSettings

_TOO_FAR = 1.5
"""Times the target from which on a divergence is too large (Schulman et al., 2017, section 4)."""
_EPSILON = 1e-5
"""Of Adam, as policies are usually trained with (Andrychowicz et al., 2021)."""


class LearningState(NamedTuple):
    """All that the next iteration depends on; a pytree of arrays, so a checkpoint holds it."""

    params: Any
    """The policy's floating-point arrays."""
    opt_state: Any
    walk: Walk
    key: jax.Array
    iteration: Int32[Array, ""]
    """How many there have been."""
    kl_weight: Float[Array, ""]
    diagnostics: dict[str, Any]
    """Of the last iteration, each a number; all 0 before the first."""


class _Updates(NamedTuple):
    """What goes from one update of an iteration to the next."""

    params: Any
    opt_state: Any
    stopped: jax.Array


class _Weights(NamedTuple):
    """Of terms of the loss that change from iteration to iteration."""

    entropy: jax.Array
    kl: jax.Array


class _Made(NamedTuple):
    """What one update was; 0 where there was none."""

    terms: LossTerms
    gradient_norm: jax.Array
    made: jax.Array
    """1, or 0 where learning had stopped before."""
    skipped: jax.Array
    """1 where the gradient was not finite, and so nothing was changed."""


class Learner:
    """A policy that learns from its own steps; functions of `LearningState`.

    Args:
        environment: in which it walks; many at once.
        policy: an Equinox module `graph -> (logits, value)`. Its floating-point arrays learn.
        settings: how.
        distribution: of its choices.
    """

    def __init__(
        self,
        environment: EnvironmentLike,
        policy: Policy,
        settings: LearningSettings,
        distribution: Distribution = CHOICES,
    ) -> None:
        self._environment = environment
        self._settings = settings
        self._distribution = distribution
        self._params, self._static = eqx.partition(policy, eqx.is_inexact_array)
        self._optimiser = optax.chain(
            optax.clip_by_global_norm(settings.most_gradient), optax.scale_by_adam(eps=_EPSILON)
        )
        self._iterate = jax.jit(self._iteration)

    @property
    def settings(self) -> LearningSettings:
        """How it learns."""
        return self._settings

    def start(self, key: jax.Array) -> LearningState:
        """The state before the first iteration.

        Args:
            key: of everything that is drawn.
        """
        key, own = jax.random.split(key)
        state = LearningState(
            self._params,
            self._optimiser.init(self._params),
            jax.jit(lambda key: begin(self._environment, self._settings.envs, key))(own),
            key,
            jnp.zeros((), jnp.int32),
            jnp.asarray(self._settings.kl_penalty or 0.0, jnp.float32),
            {},
        )
        # Weak types would be strong after the first iteration, and the second be compiled anew.
        state = jax.tree.map(_strong, state)
        # Of the compiled function, which keeps what was traced.
        shapes = jax.eval_shape(self._iterate, state).diagnostics
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return state._replace(diagnostics=zeros)

    def iterate(self, state: LearningState) -> LearningState:
        """Walk `settings.steps` steps and learn from them; compiled once."""
        return self._iterate(state._replace(diagnostics={}))

    def policy(self, state: LearningState) -> Any:
        """The policy as it is now."""
        return eqx.combine(state.params, self._static)

    def metrics(self, state: LearningState) -> dict[str, Any]:
        """The diagnostics of the last iteration as JSON values; None for what is not finite.

        Returns:
            `iteration`, from 0; `reward` of a step; `return` and `length` of the episodes that
            ended, and how many `episodes` did; `loss`, `policy_loss`, `value_loss`,
            `gradient_norm` before it was shortened, as means over updates; how many `updates` were
            made and how many of them `skipped` for a gradient that is not finite; `entropy` in
            nats, `entropies` by head, `kl` from before to after the iteration as estimated and
            `exact_kl`, `clip_fraction`, all of the policy after; `explained_variance` of the
            values before; `kl_weight`; `entropy_weight`; `rate`; `kinds` of choices, as fractions
            by name; `info` of all steps and `ended`, that of those which ended an episode, as
            means.
        """
        found = jax.device_get(state.diagnostics)
        row = jax.tree.map(_number, found)
        return {"iteration": int(state.iteration) - 1} | row

    def _iteration(self, state: LearningState) -> LearningState:
        settings = self._settings
        key, walking, shuffling = jax.random.split(state.key, 3)
        policy = self.policy(state)
        walk, steps = rollout(
            self._environment, policy, self._distribution, state.walk, settings.steps, walking
        )
        bootstrap = jax.vmap(policy)(walk.graphs)[1]
        found = gae(
            steps.reward, steps.value, steps.done, bootstrap, settings.discount, settings.trace
        )
        advantages = normalised(found.advantages) if settings.normalise else found.advantages
        whole = Batch(
            steps.graph, steps.choice, steps.log_prob, steps.value, advantages, found.returns,
            steps.logits,
        )  # fmt: skip
        batch = jax.tree.map(
            lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), whole
        )
        count = settings.envs * settings.steps
        rows = jnp.stack(
            [
                jax.random.permutation(own, count)
                for own in jax.random.split(shuffling, settings.epochs)
            ]
        ).reshape(settings.epochs * settings.minibatches, -1)
        rate = self._rate(state.iteration)
        entropy = self._decayed(settings.entropy_weight, settings.entropy_decay, state.iteration)
        weights = _Weights(entropy, state.kl_weight)
        with jax.numpy_dtype_promotion("standard"):
            updates, made = jax.lax.scan(
                lambda carry, part: self._update(carry, part, batch, rate, weights),
                _Updates(state.params, state.opt_state, jnp.zeros((), jnp.bool_)),
                rows,
            )
        after = self._after(updates.params, batch)
        diagnostics = {
            **self._measured(steps),
            **_means(made),
            "entropy": after.entropy,
            "entropies": after.entropies,
            "kl": after.kl,
            "exact_kl": after.exact_kl,
            "clip_fraction": after.clip_fraction,
            "explained_variance": explained_variance(steps.value, found.returns),
            "kl_weight": state.kl_weight,
            "entropy_weight": entropy,
            "rate": rate,
        }
        return LearningState(
            updates.params,
            updates.opt_state,
            walk,
            key,
            state.iteration + 1,
            self._adapted(state.kl_weight, after),
            diagnostics,
        )

    def _rate(self, iteration: jax.Array) -> jax.Array:
        return self._decayed(self._settings.rate, self._settings.decay, iteration)

    def _decayed(self, value: float, decay: Decay, iteration: jax.Array) -> jax.Array:
        if decay == "constant":
            return jnp.asarray(value, jnp.float32)
        left = 1.0 - iteration.astype(jnp.float32) / self._settings.iterations
        return value * jnp.maximum(left, 0.0)

    def _loss(self, params: Any, batch: Batch, weighed: _Weights) -> tuple[jax.Array, LossTerms]:
        settings, policy = self._settings, eqx.combine(params, self._static)
        weights = {
            "entropy_weight": weighed.entropy,
            "value_weight": settings.value_weight,
        }
        if settings.algorithm == "a2c":
            return a2c_loss(policy, batch, self._distribution, **weights)
        return ppo_loss(
            policy,
            batch,
            self._distribution,
            clip=settings.clip,
            value_clip=settings.value_clip,
            kl_weight=0.0 if settings.kl_penalty is None else weighed.kl,
            **weights,
        )

    def _update(
        self, carry: _Updates, rows: jax.Array, batch: Batch, rate: jax.Array, weights: _Weights
    ) -> tuple[_Updates, _Made]:
        settings = self._settings

        def learn(carry: _Updates) -> tuple[_Updates, _Made]:
            part = jax.tree.map(lambda leaf: leaf[rows], batch)
            differentiated = jax.value_and_grad(self._loss, has_aux=True)
            (_, terms), gradient = differentiated(carry.params, part, weights)
            norm = optax.tree.norm(gradient)
            stopped = jnp.zeros((), jnp.bool_)
            if settings.target_kl is not None and settings.kl_penalty is None:
                stopped = terms.kl > _TOO_FAR * settings.target_kl
            finite = jnp.isfinite(norm)
            steps, opt_state = self._optimiser.update(gradient, carry.opt_state, carry.params)
            params = jax.tree.map(
                lambda leaf, step: leaf - (rate * step).astype(leaf.dtype), carry.params, steps
            )
            new, old = (params, opt_state), (carry.params, carry.opt_state)
            keep = finite & ~stopped
            params, opt_state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
            skipped = (~finite).astype(jnp.float32)
            made = (~stopped).astype(jnp.float32)
            return _Updates(params, opt_state, stopped), _Made(terms, norm, made, skipped)

        if settings.target_kl is None or settings.kl_penalty is not None:
            return learn(carry)
        shapes = jax.eval_shape(learn, carry)[1]

        def rest(carry: _Updates) -> tuple[_Updates, _Made]:
            return carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return jax.lax.cond(carry.stopped, rest, learn, carry)

    def _after(self, params: Any, batch: Batch) -> LossTerms:
        """What the policy has become, on all steps; in parts, as they were learnt from."""
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(
                self._settings.minibatches,
                leaf.shape[0] // self._settings.minibatches,
                *leaf.shape[1:],
            ),
            batch,
        )
        nothing = _Weights(jnp.zeros(()), jnp.zeros(()))
        terms = jax.lax.map(lambda part: self._loss(params, part, nothing)[1], parts)
        return jax.tree.map(jnp.mean, terms)

    def _adapted(self, kl_weight: jax.Array, after: LossTerms) -> jax.Array:
        target = self._settings.target_kl
        if self._settings.kl_penalty is None or target is None:
            return kl_weight
        kl = after.kl if self._distribution.kl is None else after.exact_kl
        weight = jnp.where(kl > _TOO_FAR * target, 2.0 * kl_weight, kl_weight)
        return jnp.where(kl < target / _TOO_FAR, 0.5 * kl_weight, weight)

    def _measured(self, steps: Steps) -> dict[str, Any]:
        kinds = jax.vmap(jax.vmap(self._distribution.kind))(steps.choice)
        names = self._distribution.kinds
        ended = steps.done.astype(jnp.float32)
        return {
            "reward": jnp.mean(steps.reward),
            "return": _mean_where(steps.returned, steps.done),
            "length": _mean_where(steps.taken.astype(jnp.float32), steps.done),
            "episodes": jnp.sum(ended),
            "kinds": {
                name: jnp.mean((kinds == index).astype(jnp.float32))
                for index, name in enumerate(names)
            },
            "info": {name: _mean_where(own, True) for name, own in steps.info.items()},
            "ended": {name: _mean_where(own, steps.done) for name, own in steps.info.items()},
        }


def _means(made: _Made) -> dict[str, Any]:
    """Over the updates that were made."""
    count = jnp.maximum(jnp.sum(made.made), 1.0)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(made.made > 0, values, 0.0)) / count

    return {
        "loss": mean(made.terms.loss),
        "policy_loss": mean(made.terms.policy),
        "value_loss": mean(made.terms.value),
        "gradient_norm": mean(made.gradient_norm),
        "updates": jnp.sum(made.made),
        "skipped": jnp.sum(made.skipped),
    }


def _mean_where(values: Any, where: Any) -> jax.Array:
    """The mean of finite values where a condition holds; NaN where it holds nowhere."""
    values = jnp.asarray(values).astype(jnp.float32)
    counted = where & jnp.isfinite(values)
    total = jnp.sum(jnp.where(counted, values, 0.0))
    count = jnp.sum(counted.astype(jnp.float32))
    return jnp.where(count > 0, total / jnp.maximum(count, 1.0), jnp.nan)


def _strong(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def _number(leaf: Any) -> float | None:
    value = float(leaf)
    return value if math.isfinite(value) else None

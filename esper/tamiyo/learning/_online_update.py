"""One update of a policy that learns while it decides, which stays near where it began."""

from enum import IntEnum
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper.tamiyo.learning._choices import CHOICES, choice_kl
from esper.tamiyo.learning._offline import OfflineTerms, awr_loss, with_returns
from esper.tamiyo.learning._online_settings import OnlineSettings
from esper.tamiyo.learning._replay import Transition
from esper.tamiyo.policy import Logits, Policy

_HALVINGS = 4
_HEADS = ("kind", "site_query", "site_bias", "kernel_query", "seed", "value")


class Outcome(IntEnum):
    """What became of an update."""

    MADE = 0
    SKIPPED = 1
    """Its gradient is not finite, and nothing was changed."""
    HELD_BACK = 2
    """Even a small part of it leads too far, and the policy was not changed."""


class OnlineState(NamedTuple):
    """All that the next update depends on beside what was drawn; a pytree of arrays."""

    params: Any
    """Those that learn."""
    opt_state: Any


class OnlineTerms(NamedTuple):
    """What an update was."""

    outcome: Outcome
    loss: float
    """Before it."""
    kl: float
    """KL(first ‖ now) in nats after it, the mean over the batch."""
    surprise: Any
    """f32 `[batch]`: |r + γ V(after) - V|, before it."""


class _Objective(NamedTuple):
    """What a program is made for; see `OnlineSettings`."""

    discount: float
    temperature: float
    most: float
    value_weight: float
    rate: float
    most_gradient: float


class _Bounds(NamedTuple):
    """How near it stays; numbers that programs are given."""

    kl_weight: np.float32
    most_kl: np.float32


class OnlineUpdate:
    """Advantage-weighted regression near the first policy.

        loss = AWR + c_v value + c_kl mean(KL(first ‖ now))

    AWR is that of Peng et al., 2019, with r + γ V(after) for a return. A step of Adam on it is
    halved, up to four times, until in each graph of the batch KL(first ‖ now) is within the limit,
    or no larger than the largest was before; where that is never so, it is not made. So is a
    step of natural gradients kept in its region of trust (Schulman et al., 2015, appendix C), of
    which the centre stays where it is here.

    Args:
        first: where it begins, and stays near.
        settings: how.
    """

    def __init__(self, first: Policy, settings: OnlineSettings) -> None:
        learns = jax.tree.map(eqx.is_inexact_array, first)
        if settings.layers == "heads":
            learns = eqx.tree_at(
                lambda own: [getattr(own, name) for name in _HEADS],
                jax.tree.map(lambda _: False, first),
                [getattr(learns, name) for name in _HEADS],
            )
        params, self._rest = eqx.partition(first, learns)
        self._first = jax.tree.map(_strong, params)
        self._objective = _Objective(*(getattr(settings, name) for name in _Objective._fields))
        limit = np.inf if settings.most_kl is None else settings.most_kl
        self._bounds = _Bounds(np.float32(settings.kl_weight), np.float32(limit))

    def start(self) -> OnlineState:
        """Before the first update."""
        opt_state = _optimiser(self._objective).init(self._first)
        return OnlineState(self._first, jax.tree.map(_strong, opt_state))

    def policy(self, state: OnlineState) -> Policy:
        """The policy as it is now."""
        return eqx.combine(state.params, self._rest)

    def __call__(
        self, state: OnlineState, kept: Transition, weights: Any
    ) -> tuple[OnlineState, OnlineTerms]:
        """Learn from a batch; compiled once for each bucket of graphs.

        Args:
            state: returned by the last.
            kept: every leaf with the leading axis `[batch]`.
            weights: f32 `[batch]`, of the examples.
        """
        # Parts that compile once each: a program of the whole takes three times as long to make.
        before, _ = _forward(self._first, self._rest, kept.graph)
        _, after = _forward(state.params, self._rest, kept.next_graph)
        kept = kept._replace(next_graph=(after, after))
        made = _step(self._objective, self._bounds, state, self._rest, kept, before, weights)
        apart, loss = np.asarray(made.apart), float(made.loss)
        if not made.finite:
            terms = OnlineTerms(Outcome.SKIPPED, loss, float(np.mean(apart)), made.surprise)
            return state, terms
        outcome, params = Outcome.HELD_BACK, state.params
        most = max(float(self._bounds.most_kl), float(np.max(apart)))
        for halvings in range(_HALVINGS + 1):
            moved = _moved(state.params, made.steps, np.float32(0.5**halvings))
            logits, _ = _forward(moved, self._rest, kept.graph)
            own = np.asarray(_divergences(before, logits))
            # What is not a number is too far as well.
            if np.max(own) <= most:
                outcome, params, apart = Outcome.MADE, moved, own
                break
        # What is held back is remembered: with old moments the next step would be much the same.
        terms = OnlineTerms(outcome, loss, float(np.mean(apart)), made.surprise)
        return OnlineState(params, made.opt_state), terms


class _Step(NamedTuple):
    """What Adam would do."""

    finite: jax.Array
    """Whether the gradient is."""
    steps: Any
    opt_state: Any
    loss: jax.Array
    apart: jax.Array
    """KL(first ‖ now) by graph, before."""
    surprise: jax.Array


def _optimiser(objective: _Objective) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(objective.most_gradient), optax.adam(objective.rate)
    )  # fmt: skip


def _known(found: Any) -> Any:
    """A policy on what it was found to make of graphs."""
    return found


@eqx.filter_jit
def _forward(params: Any, rest: Any, graphs: Any) -> tuple[Logits, jax.Array]:
    return jax.vmap(eqx.combine(params, rest))(graphs)


@jax.jit
def _divergences(before: Logits, now: Logits) -> jax.Array:
    return jax.vmap(choice_kl)(before, now)


@jax.jit
def _moved(params: Any, steps: Any, scale: Any) -> Any:
    return jax.tree.map(lambda leaf, step: leaf + scale * step, params, steps)


@eqx.filter_jit
def _step(
    objective: _Objective,
    bounds: _Bounds,
    state: OnlineState,
    rest: Any,
    kept: Transition,
    before: Logits,
    weights: jax.Array,
) -> _Step:
    recorded = with_returns(_known, kept, objective.discount)

    def loss(params: Any) -> tuple[jax.Array, tuple[OfflineTerms, jax.Array]]:
        logits, values = jax.vmap(eqx.combine(params, rest))(kept.graph)
        found, terms = awr_loss(
            _known,
            recorded._replace(graph=(logits, values)),
            CHOICES,
            temperature=objective.temperature,
            most=objective.most,
            value_weight=objective.value_weight,
            weights=weights,
        )
        apart = _divergences(before, logits)
        return found + bounds.kl_weight * jnp.mean(apart), (terms, apart)

    differentiated = jax.value_and_grad(loss, has_aux=True)
    (found, (terms, apart)), gradient = differentiated(state.params)
    with jax.numpy_dtype_promotion("standard"):
        finite = jnp.isfinite(optax.tree.norm(gradient))
        steps, opt_state = _optimiser(objective).update(gradient, state.opt_state, state.params)
    return _Step(finite, steps, opt_state, found, apart, jnp.abs(terms.advantages))


def _strong(leaf: Any) -> jax.Array:
    # Weak types would be strong after the first update, and the second be compiled anew.
    array = jnp.asarray(leaf)
    return jax.lax.convert_element_type(array, array.dtype)

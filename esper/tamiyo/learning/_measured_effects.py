"""What choices bring by themselves, measured: each state is played to its end with and without.

An environment is a pure function, so the two futures of one state share all of their randomness,
and their difference is the choice's doing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper.errors import InputError
from esper.tamiyo.graph import ModelGraph
from esper.tamiyo.gym import Environment, State
from esper.tamiyo.policy import (
    MASKED,
    Choice,
    Effects,
    Familiar,
    Kind,
    Logits,
    Method,
    Policy,
    Reliability,
    effect_loss,
    learn_familiar,
    make_effects,
    platt,
    reliability,
    sample,
    summary,
)


class Decisions(NamedTuple):
    """Decisions whose effects were measured; every leaf `[decisions, ...]`, numpy."""

    graph: ModelGraph
    choice: Choice
    effect: Any
    """f32: rewards to the episode's end with the choice, less those without."""
    own: Any
    """bool: whether the policy would have made it, rather than chance."""
    episode: Any
    """i32: the episode it belongs to. Decisions of one share data, host and past, so those that
    judge are of episodes that none was learned from."""


def measure_effects(
    environment: Environment,
    policy: Policy,
    key: jax.Array,
    episodes: int,
    *,
    boundaries: Sequence[int] | None = None,
) -> Decisions:
    """Measure effects of choices along episodes that a policy plays.

    At each boundary every network is asked for a choice other than waiting: half of them the
    policy's, half any that is legal; so that what it would never do is known, too. Networks of
    which nothing but waiting is legal are left out.

    Args:
        episodes: played at once, from 2.
        boundaries: at which it is measured, from 0; None for all. One takes as many boundaries'
            training as there are to the end, twice.

    Raises:
        InputError: for fewer than 2 episodes or a boundary that is not there.
    """
    asked = range(environment.boundaries) if boundaries is None else boundaries
    if episodes < 2 or not all(0 <= own < environment.boundaries for own in asked):
        raise InputError(
            f"effects are measured in 2 episodes or more, at boundaries from 0 to"
            f" {environment.boundaries - 1}; got {episodes} and {list(asked)}"
        )
    programs = _Programs(environment, policy, episodes)
    reset, ask = jax.random.split(key)
    state, found = programs.reset(jax.random.split(reset, episodes)), list[Decisions]()
    for boundary in range(environment.boundaries):
        here = jax.random.fold_in(ask, boundary)
        if boundary in asked:
            decisions = programs.measured(state, here, environment.boundaries - boundary)
            found.append(jax.tree.map(np.asarray, decisions))
        state = programs.follow(state, jax.random.fold_in(here, 1))
    every: Decisions = jax.tree.map(lambda *own: np.concatenate(own), *found)
    kept = every.choice.kind != Kind.WAIT
    return jax.tree.map(lambda own: own[kept], every)


class _Programs:
    """The two futures of many states, compiled once."""

    def __init__(self, environment: Environment, policy: Policy, episodes: int) -> None:
        def graphs(state: State) -> ModelGraph:
            return jax.vmap(environment.graph)(state)

        def advanced(state: State) -> State:
            return jax.vmap(lambda own: environment.advance(own)[0])(state)

        def to_end(state: State, left: Any) -> Any:
            return jax.lax.fori_loop(0, left, lambda _, own: advanced(own), state).returned

        def measured(state: State, key: jax.Array, left: Any) -> Decisions:
            graph = graphs(state)
            logits, _ = jax.vmap(policy)(graph)
            own = jnp.arange(episodes) % 2 == 0
            draws = jax.random.split(key, episodes)
            choice = jax.vmap(_drawn)(logits, own, draws)
            acted = jax.vmap(environment.act)(state, choice)
            effect = to_end(acted, left) - to_end(state, left)
            return Decisions(graph, choice, effect, own, jnp.arange(episodes))

        def follow(state: State, key: jax.Array) -> State:
            logits, _ = jax.vmap(policy)(graphs(state))
            choice = jax.vmap(sample)(logits, jax.random.split(key, episodes))
            return advanced(jax.vmap(environment.act)(state, choice))

        self.reset = jax.jit(jax.vmap(lambda key: environment.reset(key)[0]))
        self.measured = jax.jit(measured)
        self.follow = jax.jit(follow)


def _drawn(logits: Logits, own: Any, key: jax.Array) -> Choice:
    """A choice other than waiting where one is legal: by the policy, or by chance."""
    legal = Logits(*(head > MASKED / 2 for head in logits))
    some = jnp.any(legal.kind[1:])
    flat = Logits(*(jnp.where(head, 0.0, MASKED) for head in legal))
    chosen: Logits = jax.tree.map(lambda a, b: jnp.where(own, a, b), logits, flat)
    waiting = jnp.where(some, MASKED, chosen.kind[0])
    return sample(chosen._replace(kind=chosen.kind.at[0].set(waiting)), key)


class Known(NamedTuple):
    """What was learned of a policy's limits, and how well it holds on decisions held out."""

    effects: Effects
    familiar: Familiar
    max_epistemic: float
    """Of no decision held out are estimates further apart.

    A bound that they pass often would cost the best grafts: estimates of what brings most are
    furthest apart."""
    curve: Reliability
    """Of the probability that an effect is above 0, on decisions that nothing was learned from."""
    before: Reliability
    """The same without calibration."""
    correlation: float
    """Between effects estimated and measured, on the same."""
    losses: list[float]


def learn_effects(
    policy: Policy,
    decisions: Decisions,
    key: jax.Array,
    *,
    method: Method = "ensemble",
    epochs: int = 60,
    batch: int = 128,
    rate: float = 1e-3,
) -> Known:
    """Learn what choices bring, calibrate it, and hold it against decisions held out.

    The decisions of 60 % of the episodes are learned from, those of 20 % calibrate, and those of
    20 % judge.

    Args:
        epochs: passes over the data.
        rate: of Adam.

    Raises:
        InputError: for fewer than 50 decisions, or of fewer than 5 episodes.
    """
    count = len(decisions.effect)
    if count < 50:
        raise InputError(f"effects are learned from 50 decisions or more, got {count}")
    episodes = np.unique(decisions.episode)
    if len(episodes) < 5:
        raise InputError(
            f"effects are learned from decisions of 5 episodes or more, so that some can be held"
            f" out; these are of {len(episodes)}"
        )
    order_key, made, draw = jax.random.split(key, 3)
    parts = _by_episode(decisions, episodes, order_key)
    embed = jax.jit(jax.vmap(policy.embed))
    embedded = [embed(own.graph) for own in parts]
    effects = make_effects(made, policy.width, method=method)
    scale = jnp.asarray(max(float(parts[0].effect.std()), 1e-6), jnp.float32)
    effects = eqx.tree_at(lambda own: own.scale, effects, scale)
    effects, losses = _fitted(effects, embedded[0], parts[0], draw, epochs, batch, rate)
    ask = eqx.filter_jit(eqx.filter_vmap(effects))
    said = [np.asarray(ask(e, p.choice).probability) for e, p in zip(embedded, parts, strict=True)]
    true = [own.effect > 0.0 for own in parts]
    slope, shift = platt(said[1], true[1])
    effects = eqx.tree_at(
        lambda own: (own.slope, own.shift), effects, (jnp.float32(slope), jnp.float32(shift))
    )
    judged = judge_effects(policy, effects, parts[2])
    sums = [np.asarray(jax.vmap(summary)(own.graph)) for own in parts]
    return Known(
        effects,
        learn_familiar(sums[0], sums[1]),
        judged.max_epistemic,
        judged.curve,
        reliability(said[2], true[2]),
        judged.correlation,
        losses,
    )


class JudgedEffects(NamedTuple):
    """What was said of decisions, held against what was measured."""

    curve: Reliability
    """Of the probability that an effect is above 0."""
    correlation: float
    """Between effects estimated and measured."""
    max_epistemic: float
    """The furthest that estimates of one of them are apart."""


def judge_effects(policy: Policy, effects: Effects, decisions: Decisions) -> JudgedEffects:
    """Hold what a policy says of effects against decisions that nothing was learned from.

    Args:
        decisions: of `measure_effects`, with a key that is not that of the ones learned from.
    """
    embedded = jax.jit(jax.vmap(policy.embed))(decisions.graph)
    said = eqx.filter_jit(eqx.filter_vmap(effects))(embedded, decisions.choice)
    return JudgedEffects(
        reliability(np.asarray(said.probability), decisions.effect > 0.0),
        float(np.corrcoef(np.asarray(said.effect), decisions.effect)[0, 1]),
        float(np.max(np.asarray(said.epistemic))),
    )


def _by_episode(decisions: Decisions, episodes: np.ndarray, key: jax.Array) -> list[Decisions]:
    """Three parts, of 60, 20 and 20 % of the episodes as drawn; an episode is in one alone."""
    order = episodes[np.asarray(jax.random.permutation(key, len(episodes)))]
    shares = np.split(order, [int(0.6 * len(order)), int(0.8 * len(order))])
    members = [np.isin(decisions.episode, share) for share in shares]
    return [jax.tree.map(lambda own, rows=rows: own[rows], decisions) for rows in members]


def _fitted(
    effects: Effects, embedded: Any, part: Decisions, key: jax.Array, epochs: int, batch: int,
    rate: float,
) -> tuple[Effects, list[float]]:  # fmt: skip
    count, networks = len(part.effect), len(effects.members.last.weight)
    weights_key, key = jax.random.split(key)
    # As of data drawn with replacement, for each network by itself (Oza and Russell, 2001).
    weights = jax.random.poisson(weights_key, 1.0, (count, networks)).astype(jnp.float32)
    if effects.method == "dropout":
        weights = jnp.ones_like(weights)
    params, static = eqx.partition(effects.members, eqx.is_array)
    adam = optax.adam(rate)

    def loss(params: Any, rows: Any, key: jax.Array) -> Any:
        own = eqx.tree_at(lambda tree: tree.members, effects, eqx.combine(params, static))

        def one(example: Any, key: Any) -> Any:
            left_out = key if effects.method == "dropout" else None
            embedded, choice, effect, weights = example
            return effect_loss(own, embedded, choice, effect, weights, left_out)

        example = embedded, part.choice, part.effect, weights
        taken = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], example)
        return jnp.mean(jax.vmap(one)(taken, jax.random.split(key, len(rows))))

    @jax.jit
    def step(params: Any, moments: Any, rows: Any, key: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, rows, key)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = adam.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, value

    moments, losses = adam.init(params), list[float]()
    size = min(batch, count)
    for epoch in range(epochs):
        own = jax.random.fold_in(key, epoch)
        order = jax.random.permutation(own, count)
        values = []
        for place in range(0, count - size + 1, size):
            rows = order[place : place + size]
            params, moments, value = step(params, moments, rows, jax.random.fold_in(own, place))
            values.append(value)
        losses.append(float(np.mean([np.asarray(value) for value in values])))
    done = eqx.tree_at(lambda tree: tree.members, effects, eqx.combine(params, static))
    return done, losses

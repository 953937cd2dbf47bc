"""A policy that was trained, with what it knows of its own limits: asked for advice."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esper.tamiyo.graph import NODE_FEATURES, RUN_FEATURES, ModelGraph, list_seeds
from esper.tamiyo.policy._choice import Choice, Kind, best, log_prob
from esper.tamiyo.policy._effects import Effects, Estimate
from esper.tamiyo.policy._familiar import SUMMARY, Familiar, distances
from esper.tamiyo.policy._policy import Policy

_REASONS = 3


class Advice(NamedTuple):
    """What a policy would do with a network, and how sure it is."""

    choice: Choice
    """Whole numbers."""
    wanted: Choice
    """What it would have chosen, were it surer; otherwise as `choice`."""
    value: float
    """Estimated rewards to the end."""
    confidence: float
    """Calibrated probability that `wanted` does good, in [0, 1]; 1 for waiting."""
    epistemic: float
    """Standard deviation of the estimated effect for want of data, in units of the reward."""
    aleatoric: float
    """The same for what is not seen in a network."""
    effect: tuple[float, float, float]
    """Of `wanted`: estimated, and the ends of its 95 % interval."""
    distance: float
    """How unlike the network is to those of training; above 1 is unlike any of them."""
    remark: str
    """Why it waits although it would have liked to do something; "" otherwise."""
    reasons: tuple[tuple[str, float], ...]
    """Features that moved it most towards `wanted`, by name, with their part in its logarithmic
    probability; of waiting none."""


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
    """A policy, its estimates, and what it has seen. Its advice is a function of the graph."""

    policy: Policy
    effects: Effects
    familiar: Familiar
    max_epistemic: float
    """Above it, it waits; in units of the reward."""
    min_confidence: float
    """Below it, it waits."""
    card: dict[str, Any]
    """What is known of it: how it was trained and what it was found to do."""

    def decide(self, graph: ModelGraph) -> Advice:
        """What to do with one network."""
        one = list_seeds(jax.tree.map(np.asarray, graph))
        return self.decide_many(jax.tree.map(lambda leaf: leaf[None], one))[0]

    def decide_many(self, graphs: ModelGraph) -> list[Advice]:
        """What to do with networks of one bucket, in one batched forward.

        Args:
            graphs: every leaf with the leading axis `[networks]`.
        """
        asked = _forward(self.policy, self.effects, self.familiar, graphs)
        found: _Asked = jax.tree.map(np.asarray, asked)
        reasons: list[tuple[tuple[str, float], ...]] = [()] * len(found.value)
        if (found.choice.kind != Kind.WAIT).any():
            # One pass more for all of them, and none where all wait.
            runs, nodes = map(np.asarray, _parts(self.policy, graphs, found.choice))
            reasons = [
                _strongest(run, node, _REASONS) for run, node in zip(runs, nodes, strict=True)
            ]
        return [
            self._advice(jax.tree.map(lambda leaf, i=i: leaf[i], found), own)
            for i, own in enumerate(reasons)
        ]

    def compile(self, graphs: ModelGraph) -> None:
        """Compile all that advice about as many graphs of this shape may take."""
        asked = _forward(self.policy, self.effects, self.familiar, graphs)
        _parts(self.policy, graphs, jax.tree.map(np.asarray, asked.choice))

    def _advice(self, found: "_Asked", reasons: tuple[tuple[str, float], ...]) -> Advice:
        wanted = Choice(*(int(own) for own in found.choice))
        waits = wanted.kind == Kind.WAIT
        own, spread = found.estimate, float(found.spread)
        effect, epistemic = float(own.effect), float(own.epistemic)
        distance, confidence = float(found.far.max()), float(own.probability)
        name = SUMMARY[int(found.far.argmax())]
        remark = "" if waits else self._against(distance, name, epistemic, confidence)
        return Advice(
            wanted if not remark else Choice(0, 0, 0, 0, 0),
            wanted,
            float(found.value),
            confidence,
            epistemic,
            float(own.aleatoric),
            (effect, effect - 1.96 * spread, effect + 1.96 * spread),
            distance,
            remark,
            () if waits else reasons,
        )

    def _against(self, distance: float, name: str, epistemic: float, confidence: float) -> str:
        # Of what is no number none of these holds.
        if not distance <= 1.0:
            return (
                f"the network is unlike any that the policy was trained on: its {name} is"
                f" {distance:.3g} times as far off as anything that was"
            )
        if not epistemic <= self.max_epistemic:
            return (
                f"the effect is not known: estimates are {epistemic:.3g} apart, and may be"
                f" {self.max_epistemic:.3g}"
            )
        if not confidence >= self.min_confidence:
            return (
                f"the effect is likely not good: its probability to be is {confidence:.3g}, and"
                f" must be {self.min_confidence:.3g}"
            )
        return ""


class _Asked(NamedTuple):
    choice: Choice
    value: Any
    estimate: Estimate
    spread: Any
    far: Any
    """Distances by number of the summary, over the threshold."""


@eqx.filter_jit
def _forward(policy: Policy, effects: Effects, familiar: Familiar, graphs: ModelGraph) -> _Asked:
    def one(graph: ModelGraph) -> _Asked:
        embedded = policy.embed(graph)
        logits, value = policy.heads(graph, embedded)
        choice = best(logits)
        estimate = effects(embedded, choice)
        far = distances(familiar, graph) / familiar.threshold
        return _Asked(choice, value, estimate, estimate.spread, far)

    return jax.vmap(one)(graphs)


def explain(
    policy: Policy, graph: ModelGraph, choice: Choice, count: int = _REASONS
) -> tuple[tuple[str, float], ...]:
    """The features that moved a policy towards a choice, the strongest first.

    The part of a feature is its value times the derivative of the choice's logarithmic probability
    by it (gradient times input: Shrikumar et al., 2017), of the run and of the site concerned.
    """
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[None], (graph, choice))
    run, node = _parts(policy, one[0], Choice(*(own.astype(np.int32) for own in one[1])))
    return _strongest(np.asarray(run)[0], np.asarray(node)[0], count)


def _strongest(run: np.ndarray, node: np.ndarray, count: int) -> tuple[tuple[str, float], ...]:
    names = (*RUN_FEATURES, *(f"site_{name}" for name in NODE_FEATURES))
    parts = zip(names, np.concatenate([run, node]).tolist(), strict=True)
    return tuple(sorted(parts, key=lambda own: -abs(own[1]))[:count])


@eqx.filter_jit
def _parts(policy: Policy, graphs: ModelGraph, choices: Choice) -> tuple[Any, Any]:
    """Of each graph's run `[graphs, RUN]`, and of the site of its choice `[graphs, NODE]`."""

    def one(graph: ModelGraph, choice: Choice) -> tuple[Any, Any]:
        def likely(run: Any, nodes: Any) -> Any:
            logits, _ = policy(graph._replace(run=run, nodes=nodes))
            return log_prob(logits, choice)

        run, nodes = jnp.asarray(graph.run), jnp.asarray(graph.nodes)
        by_run, by_nodes = jax.grad(likely, argnums=(0, 1))(run, nodes)
        return by_run * run, (by_nodes * nodes)[choice.node]

    return jax.vmap(one)(graphs, choices)

"""From nothing to a policy fit to be used: trained, its limits measured, held against others.

The parts are `train`, `measure_effects`, `learn_effects` and `play`; this is the order in which the
policy that comes with Esper was made from them.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from esper.errors import InputError
from esper.nissa import half_width
from esper.tamiyo import make_controller
from esper.tamiyo.gym import HELD_OUT, OFFERS, Environment
from esper.tamiyo.gym._advised import advised
from esper.tamiyo.gym._controlled import Choosing, Controlled, play, waiting
from esper.tamiyo.learning._measured_effects import (
    Decisions,
    Known,
    learn_effects,
    measure_effects,
)
from esper.tamiyo.learning._settings import LearningSettings
from esper.tamiyo.learning._train import Learnt, train
from esper.tamiyo.policy import LoadedPolicy, Method, Policy, make_policy

RIVALS = ("heuristic", "bandit", "random", "fixed", "never-grow")
"""What a policy is held against."""

_LAST = 10
"""Iterations over which the end of training is told: one has few episodes."""
_GRAFTED = 3
"""Optimiser steps of an episode over those that a kernel is on trial for, beyond its ramp."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a policy is made.

    Raises:
        InputError: for values out of range.
    """

    seed: int = 0
    """Of everything that is drawn."""
    environment: Environment = dataclasses.field(default_factory=Environment)
    learning: LearningSettings = dataclasses.field(
        default_factory=lambda: LearningSettings(
            iterations=120,
            envs=256,
            steps=20,
            epochs=4,
            minibatches=8,
            discount=0.995,
            trace=0.9,
            entropy_weight=0.02,
            entropy_decay="linear",
            value_weight=1.0,
            rate=1.5e-3,
            decay="linear",
            target_kl=0.03,
        )
    )
    width: int = 32
    rounds: int = 2
    heads: int = 4
    method: Method = "ensemble"
    """Of telling what is not known."""
    effect_episodes: int = 512
    """Along which effects are measured, from 2."""
    effect_boundaries: tuple[int, ...] = (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)
    """At which."""
    min_confidence: float = 0.25
    """Below it, the policy waits, in [0, 1]. Effects are skewed: a graft that failed is taken out
    again and cost little, and one that did not brings much, so that one which is more likely
    not good may well be worth it."""
    evaluated: int = 32
    """Episodes of each family on which it is judged, from 2."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_confidence <= 1.0 or self.evaluated < 2:
            raise InputError(
                f"`min_confidence` is in [0, 1] and `evaluated` from 2 on, got"
                f" {self.min_confidence} and {self.evaluated}"
            )


def quick_recipe() -> Recipe:
    """One that is done within a minute or two, and whose policy has learned next to nothing."""
    environment = Environment(
        families=("blobs", "ring"), offers=OFFERS[2:], depth=1, widths=(3,), seeds=1, boundaries=4,
        steps=2, ramp=2, batch=8, examples=16, validation=16,
    )  # fmt: skip
    learning = LearningSettings(iterations=2, envs=8, steps=4, epochs=1, minibatches=2)
    return Recipe(
        environment=environment,
        learning=learning,
        width=8,
        rounds=1,
        heads=2,
        effect_episodes=32,
        effect_boundaries=(1, 2),
        evaluated=2,
    )


class Judged(NamedTuple):
    """Returns of one arm in one family, and its lead over waiting and over the heuristic."""

    family: str
    arm: str
    mean: float
    half: float
    """Half of the mean's 95 % interval, over episodes."""
    lead: float
    """Of the policy over this arm, in episodes of equal randomness."""
    lead_half: float
    """Half of its 95 % interval."""


def make(
    recipe: Recipe,
    folder: Path | None = None,
    *,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
    stop: Callable[[], bool] = lambda: False,
) -> LoadedPolicy:
    """Train a policy, learn its limits, and judge it; what was found is on its card.

    Args:
        folder: where training is kept, to be gone on with; None keeps nothing.
        told: is called with each iteration's row.
        stop: is asked before each iteration whether to stop.

    Raises:
        Interrupted: when asked to stop.
    """
    keys = [jax.random.key(recipe.seed + own) for own in range(5)]
    policy = make_policy(keys[0], width=recipe.width, rounds=recipe.rounds, heads=recipe.heads)
    learnt = train(
        recipe.environment, policy, recipe.learning, keys[1], folder=folder, told=told, stop=stop
    )
    decisions = measure_effects(
        recipe.environment, learnt.policy, keys[2], recipe.effect_episodes,
        boundaries=recipe.effect_boundaries,
    )  # fmt: skip
    known = learn_effects(learnt.policy, decisions, keys[3], method=recipe.method)
    loaded = loaded_policy(learnt.policy, known, recipe.min_confidence)
    judged = judge(recipe.environment, loaded, keys[4], recipe.evaluated)
    return dataclasses.replace(loaded, card=_card(recipe, learnt, decisions, known, judged))


def _card(
    recipe: Recipe, learnt: Learnt, decisions: Decisions, known: Known, judged: list[Judged]
) -> dict[str, Any]:
    """What was found, as a policy's file says it."""
    last = learnt.metrics[-_LAST:]
    return {
        "recipe": _plain(recipe),
        "training": {
            "return": _mean(row["return"] for row in last),
            "explained_variance": _mean(row["explained_variance"] for row in last),
            "steps": recipe.learning.iterations * recipe.learning.envs * recipe.learning.steps,
            "health": learnt.diagnosis.health,
        },
        "effects": {
            "decisions": len(decisions.effect),
            "calibration_error": known.curve.ece,
            "calibration_error_before": known.before.ece,
            "correlation": known.correlation,
            "reliability": {
                "said": _numbers(known.curve.said),
                "true": _numbers(known.curve.true),
                "counts": known.curve.counts.tolist(),
            },
        },
        "judged": [row._asdict() for row in judged],
    }


def loaded_policy(policy: Policy, known: Known, min_confidence: float) -> LoadedPolicy:
    """A policy with its limits, and without a card."""
    return LoadedPolicy(
        policy, known.effects, known.familiar, known.max_epistemic, min_confidence, {}
    )


def rivals(environment: Environment) -> dict[str, Choosing]:
    """What a policy is held against, by the names of `RIVALS`, as each is by default in runs."""
    trial = environment.ramp + environment.boundaries * environment.steps // (2 * _GRAFTED)
    every = max(1, environment.boundaries // 4) * environment.steps
    judged: dict[str, Any] = {
        "trigger": {"kind": "plateau", "patience": 2, "min_improvement": 0.1},
        "trial_steps": trial,
        "enough_loss": 0.01,
    }
    kinds: dict[str, dict[str, Any]] = {
        "heuristic": judged,
        "bandit": judged,
        "random": {"grafts": 0.1, "trial_steps": trial},
        "fixed": {"every": every, "first": every},
    }

    def controlled(kind: str) -> Choosing:
        def make(_: int) -> Any:
            return make_controller(kind, **kinds[kind])

        return Controlled(environment, make)

    return {name: controlled(name) if name in kinds else waiting for name in RIVALS}


def judge(
    environment: Environment, loaded: LoadedPolicy, key: jax.Array, episodes: int
) -> list[Judged]:
    """Hold a policy against its rivals, in its own families and in those held out.

    All play the same episodes: equal data, hosts and batches, as many of each family.

    Args:
        episodes: of each family, from 2.
    """
    families = (*environment.families, *(f for f in HELD_OUT if f not in environment.families))
    every = dataclasses.replace(environment, families=families)
    arms: dict[str, Choosing] = {"learned": advised(every, loaded), **rivals(every)}
    played = {
        arm: play(every, key, episodes, choosing, each_family=True)
        for arm, choosing in arms.items()
    }
    found: list[Judged] = []
    for place, family in enumerate(families):
        here = played["learned"].family == place
        learned = played["learned"].returned[here].astype(np.float64)
        for arm, result in played.items():
            returned = result.returned[here].astype(np.float64)
            gap = learned - returned
            found.append(
                Judged(
                    family, arm, float(returned.mean()), float(half_width(returned)),
                    float(gap.mean()), float(half_width(gap)),
                )
            )  # fmt: skip
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _plain(recipe: Recipe) -> dict[str, Any]:
    # As a file holds it: lists for tuples.
    return json.loads(json.dumps(dataclasses.asdict(recipe)))

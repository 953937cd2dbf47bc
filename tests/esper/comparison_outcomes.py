"""Outcomes to compare, as runs give them, made up where no run need be made."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esper.tolaria.comparison import Budget, Curve, Design, Outcome, Setting

SETTING = Setting(
    task="spirals",
    task_digest="ab" * 32,
    backend="jax",
    host_sites=("layers.0", "layers.1"),
    host_parameters=42,
    planned_steps=500,
    recipe=(("batch_size", "None"), ("learning_rate", "0.01"), ("optimizer", "adam")),
    branched=False,
    versions=(("jax", "0.10.2"), ("python", "3.11.7")),
)
CONTROLS = ("static-small", "static-final", "fixed", "random")


def outcome(
    arm: str, seed: int, accuracy: float | None, budget: Budget = "steps", **changes: Any
) -> Outcome:
    """An outcome at 500 steps, with a curve that rises to its accuracy."""
    setting = dataclasses.replace(
        SETTING, **{k: changes.pop(k) for k in list(changes) if hasattr(SETTING, k)}
    )
    end = 0.5 if accuracy is None else accuracy
    steps = range(0, 501, 100)
    values: dict[str, Any] = {
        "folder": f"runs/{budget}/{arm}/seed-{seed}",
        "ended": True,
        "diverged_at": None,
        "rollbacks": 0,
        "steps": 500,
        "test_accuracy": accuracy,
        "test_loss": None if accuracy is None else 1.0 - accuracy,
        "reward": accuracy,
        "validation_loss": 0.5,
        "parameters": 42 if arm == "static-small" else 1_458,
        "training_flops": 1e6,
        "kept": 1,
        "removed": 2,
        "compilations": 3,
        "seconds": 12.5,
        "curve": Curve(
            steps=tuple(steps),
            flops=tuple(2e3 * step for step in steps),
            test_accuracy=tuple(0.5 + (end - 0.5) * step / 500 for step in steps),
            test_loss=tuple(1.0 - (end - 0.5) * step / 500 for step in steps),
        ),
    }
    return Outcome(arm=arm, seed=seed, budget=budget, setting=setting, **(values | changes))


def outcomes(
    values: Mapping[str, Sequence[float]], budget: Budget = "steps", **changes: Any
) -> list[Outcome]:
    """The runs of several arms, with seeds from 0."""
    return [
        outcome(arm, seed, float(value), budget, **changes)
        for arm, row in values.items()
        for seed, value in enumerate(row)
    ]


def design(count: int = 10, **changes: Any) -> Design:
    """The heuristic controller beside the controls that growth needs."""
    values: dict[str, Any] = {
        "treatment": "heuristic",
        "controls": CONTROLS,
        "seeds": tuple(range(count)),
        "smallest_effect": 0.01,
    }
    return Design(**(values | changes))


def typical(seeds: int = 10, budget: Budget = "steps") -> list[Outcome]:
    """One control far behind, one ahead, one alike, and one that cannot be told."""
    random = np.random.default_rng(20_260)
    base = 0.8 + 0.01 * random.normal(size=seeds)
    gaps = {"heuristic": (0.0, 0.0), "static-small": (-0.2, 0.03), "static-final": (0.05, 0.01),
            "fixed": (0.0, 0.001), "random": (0.005, 0.02)}  # fmt: skip
    return outcomes(
        {arm: base + mean + spread * random.normal(size=seeds)
         for arm, (mean, spread) in gaps.items()},
        budget,
    )  # fmt: skip

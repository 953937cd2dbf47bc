"""Runs with everything in them, small enough to be trained many times."""

import json
from pathlib import Path
from typing import Any

from esper.tolaria import GrowConfig, make_config

EVENTFUL: dict[str, Any] = {
    "task": "spirals",
    "steps": 240,
    "decide_every": 20,
    "checkpoint_every": 40,
    "batch_size": 64,
    "loading_steps": 7,
    "incubation_steps": 6,
    "ramp_steps": 15,
    "ramp": "cosine",
    "kernel_warmup_steps": 10,
    "trial_steps": 12,
    "patience": 1,
    "initialisation": "gradmax",
    "controller": "bandit",
    "variants": 2,
    "seeds_per_layer": 3,
    "optimizer": "adamw",
    "weight_decay": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 10,
    "clip_norm": 5.0,
    "ema_decay": 0.9,
    "accumulate": 2,
    "safety": {"cooldown_steps": 40},
}
"""Grafts, incubations, ramps, warm-ups, verdicts, vetoes."""

UNSTEADY: dict[str, Any] = EVENTFUL | {
    "optimizer": "sgd",
    "weight_decay": 0.0,
    "learning_rate": 10.0,
    "momentum": 0.9,
    "clip_norm": None,
    "ema_decay": None,
    "divergence": 1.5,
    "max_rollbacks": 8,
}
"""The same, at a learning rate at which it diverges, so that batches are left out."""


HARMED: dict[str, Any] = EVENTFUL | {
    "steps": 120,
    "controller": "fixed",
    "graft_every": 20,
    "loading_steps": 1,
    "incubation_steps": 0,
    "ramp_steps": 5,
    "initialisation": "as_compiled",
    "blend": "convex",
    "kernel_warmup_steps": 10_000,
    "safety": {"unload_below_worth": 0.0, "judge_after_steps": 20},
}
"""Kernels that hardly learn stand in for what the host has learned, and are unloaded for it."""


def config(tmp_path: Path, backend: str, values: dict[str, Any], **changes: Any) -> GrowConfig:
    return make_config(**{**values, "backend": backend, "library": tmp_path / "library", **changes})


def entries(run: Path) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_bytes().splitlines()
    return [json.loads(line)["entry"] for line in lines]


def measured(run: Path) -> list[dict[str, Any]]:
    """The measurements, but for what is of the process that made them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    left_out = ("seconds", "compilations")
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]

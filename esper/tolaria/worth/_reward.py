"""What a change was worth.

Each of the components is a potential, and what a change earns is its difference, F = Φ(after) -
Φ(before) (Ng, Harada and Russell, Policy Invariance Under Reward Transformations, ICML 1999). So
nothing that comes back to where it was has earned anything, in however many steps it did so, and no
change is paid twice. A policy may be trained on it under `jax.vmap`. Nothing in it reads a clock.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from esper.errors import InputError
from esper.tolaria.worth._components import REWARD_COMPONENTS, Measurements, SpeedFrom

DEFAULT_WEIGHTS: Mapping[str, float] = MappingProxyType(dict.fromkeys(REWARD_COMPONENTS, 1.0))
"""All alike: which matters more is for whoever asks to say."""


class Reward(NamedTuple):
    """What a change earned."""

    total: Any
    """Mean of the components, weighted; in [-1, 1]."""
    components: dict[str, Any]
    """By name, each in [-1, 1]."""


def reward(
    before: Measurements,
    after: Measurements,
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    *,
    speed: SpeedFrom = "flops",
) -> Reward:
    """What the change from `before` to `after` earned.

    Antisymmetric, zero where nothing changed, monotone in each measurement, and the sum over a
    sequence of changes is that of the change from its first to its last. To ask what a decision was
    worth, and not what training was meanwhile, measure both at one step: `before` without the
    kernel (see `measure`).

    Args:
        weights: by component, not negative; what is not in it has none.
        speed: where speed is taken from. Decisions use `flops`, which are counted and so the same
            in every run; `latency` is for reports.

    Returns:
        Numbers of numpy, or arrays of jax where the measurements are.

    Raises:
        InputError: for weights that are unknown, negative, not finite or all zero, or an unknown
            `speed`.
    """
    _check_weights(weights)
    if speed not in ("flops", "latency"):
        raise InputError(f"`speed` must be 'flops' or 'latency', got {speed!r}")
    xp, dtype = _library((*before, *after))
    first, second = (
        Measurements(*(xp.asarray(v, dtype=dtype) for v in m)) for m in (before, after)
    )
    earned = {
        name: row.potential(second, xp, speed) - row.potential(first, xp, speed)
        for name, row in REWARD_COMPONENTS.items()
    }
    scale = sum(weights.values())
    total = sum(earned[name] * (weight / scale) for name, weight in weights.items())
    return Reward(total, earned)


def _library(values: tuple[Any, ...]) -> tuple[Any, Any]:
    """The arrays' library and dtype: jax in float32 where anything is of it, else numpy."""
    for value in values:
        space = getattr(value, "__array_namespace__", None)
        if space is not None and not isinstance(value, np.ndarray | np.generic):
            xp = space()
            return xp, xp.float32
    return np, np.float64


def _check_weights(weights: Mapping[str, float]) -> None:
    unknown = sorted(set(weights) - set(REWARD_COMPONENTS))
    if unknown:
        raise InputError(
            f"unknown reward component {', '.join(map(repr, unknown))}: expected some of"
            f" {', '.join(REWARD_COMPONENTS)}"
        )
    bad = {n: w for n, w in weights.items() if not (math.isfinite(w) and w >= 0)}
    if bad or not any(weights.values()):
        raise InputError(
            "weights of reward components must be finite, not negative, and not all zero, got"
            f" {dict(weights)}"
        )

"""From an arm of a comparison to the configuration of one of its runs."""

import math
from typing import Any

from esper.errors import InputError
from esper.tolaria._config import GrowConfig, make_config
from esper.tolaria.comparison._asked import Comparison
from esper.tolaria.comparison._kept import KeptKernel
from esper.tolaria.tasks import task_of_seed

BOUNDARIES = 200
"""Most decision boundaries of a run that does not grow: looking costs time and decides nothing."""


def treatment_config(asked: Comparison, seed: int, library: Any) -> GrowConfig:
    """The configuration of the treatment.

    Raises:
        InputError: for keys that are unknown or out of range.
    """
    own = {"controller": asked.treatment} | asked.own_arms.get(asked.treatment, {})
    return make_config(**_common(asked, seed, library) | own)


def control_config(
    asked: Comparison,
    arm: str,
    seed: int,
    library: Any,
    *,
    grafts: int,
    kept: list[KeptKernel],
    fresh: list[KeptKernel],
    host_step_flops: float,
    flops: float | None,
) -> GrowConfig:
    """The configuration of a control, given what the treatment of the same seed came to.

    Args:
        grafts: how many the treatment made.
        kept: the kernels that the treatment kept.
        fresh: the same, with first parameters that nobody chose.
        host_step_flops: of a training step of the host alone.
        flops: that the run may use; None for as many steps as the treatment.

    Raises:
        InputError: for keys that are unknown or out of range.
    """
    common = _common(asked, seed, library)
    base = make_config(**common)
    boundaries = base.steps // base.decide_every
    every = max(1, base.steps // (grafts + 1) // base.decide_every) * base.decide_every
    own: dict[str, Any] = {
        "static-small": {"controller": "none"},
        "static-final": _initial(kept),
        "scratch": _initial(fresh),
        # As many grafts as the treatment, looking at nothing.
        "fixed": {"controller": "fixed", "graft_every": every, "max_grafts": grafts},
        "random": {
            "controller": "random",
            "max_grafts": grafts,
            "graft_probability": min(1.0, 2.0 * grafts / max(1, boundaries)),
        },
        "heuristic": {"controller": "heuristic"},
        "bandit": {"controller": "bandit"},
        "learned": {"controller": "learned"},
    }.get(arm, {"controller": "heuristic"}) | asked.own_arms.get(arm, {})
    if flops is not None:
        steps = max(1, math.ceil(flops / host_step_flops))
        own |= {"max_training_flops": flops, "steps": min(steps, 10_000_000)}
        if own["controller"] == "none":
            own |= _seldom(base, own["steps"])
    return make_config(**common | own)


def check_configs(asked: Comparison, library: Any) -> dict[str, GrowConfig]:
    """Refuse a comparison of which some arm could not be run, before any is.

    Returns:
        A configuration of each arm, as if the treatment made no graft.

    Raises:
        InputError: for keys that are unknown or out of range, naming the arm.
    """
    seed = asked.seeds[0]
    found = {asked.treatment: treatment_config(asked, seed, library)}
    for budget in asked.budgets:
        for arm in asked.controls:
            try:
                found[arm] = control_config(
                    asked, arm, seed, library,
                    grafts=0, kept=[], fresh=[], host_step_flops=1.0,
                    flops=1.0 if budget == "flops" else None,
                )  # fmt: skip
            except InputError as error:
                raise InputError(
                    f"the arm {arm!r} cannot be run under equal {budget}: {error}"
                ) from error
    return found


def _common(asked: Comparison, seed: int, library: Any) -> dict[str, Any]:
    return {
        **asked.values,
        "task": task_of_seed(asked.task, seed),
        "backend": asked.backend,
        "seed": seed,
        "library": library,
    }


def _initial(kernels: list[KeptKernel]) -> dict[str, Any]:
    grafts = [{"site": k.site, "seed": k.seed, "kernel": k.kernel} for k in kernels]
    return {"controller": "none", "initial_grafts": grafts}


def _seldom(base: GrowConfig, steps: int) -> dict[str, int]:
    """Boundaries and checkpoints of a run that is longer than it was thought to be."""
    every = max(base.decide_every, -(-steps // BOUNDARIES))
    return {"decide_every": every, "checkpoint_every": every * max(1, BOUNDARIES // 5)}

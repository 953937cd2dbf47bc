"""From a configuration to who decides in a run, and what they may do."""

from collections.abc import Sequence
from typing import Any

from esper.errors import InputError
from esper.oona import Broker
from esper.tamiyo import Controller, Guard, Safety, make_controller
from esper.tolaria._config import GrowConfig, ServiceConfig


def _trigger(config: GrowConfig) -> dict[str, Any]:
    threshold = config.trigger_threshold
    options: dict[str, dict[str, Any]] = {
        "plateau": {"patience": config.patience, "min_improvement": config.min_improvement},
        "gradient_bottleneck": {} if threshold is None else {"threshold": threshold},
        "held_out_gain": {} if threshold is None else {"min_gain": threshold},
        "schedule": {"first": config.graft_every, "every": config.graft_every},
        "random": {"rate": config.graft_probability},
    }
    return {"kind": config.trigger, **options[config.trigger]}


def controller_of(
    config: GrowConfig,
    sites: Sequence[str],
    *,
    run: str = "run",
    broker: Broker | None = None,
    asks: bool = True,
) -> Controller | None:
    """The controller that a configuration asks for; None where nothing is to grow.

    Args:
        sites: names of the layers with seeds, by row.
        run: by which a service knows the run, where the configuration names it otherwise.
        broker: the bus that a service is on, where the configuration names none.
        asks: whether a service is asked at all, and not only done again what was recorded.

    Raises:
        InputError: for values that it does not take.
    """
    in_place = config.loading_steps + config.incubation_steps + config.ramp_steps
    trial_steps = in_place + config.trial_steps
    judged = {
        "trigger": _trigger(config),
        "enough_loss": config.enough_loss,
        "trial_steps": trial_steps,
        "min_worth": config.min_worth,
        "judge_by": config.judge_by,
        "trials": config.trials,
    }
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "fixed": _schedule(config, sites),
        "random": {
            "grafts": config.graft_probability,
            "keep": config.keep_probability,
            "trial_steps": trial_steps,
            "trials": config.trials,
            "max_grafts": config.max_grafts,
        },
        "heuristic": {**judged, "offset": config.seed},
        "bandit": judged,
        "learned": {"policy": config.policy, "offset": config.seed},
        "service": _service(config, run, broker, asks=asks),
    }
    return make_controller(config.controller, **options[config.controller])


def _service(config: GrowConfig, run: str, broker: Broker | None, *, asks: bool) -> dict[str, Any]:
    if config.controller != "service":
        return {}
    own = config.service or ServiceConfig()
    bus = own.bus or broker
    if asks and bus is None:
        raise InputError(
            "a run that asks a service needs the bus that the service is on: write"
            " `service: {bus: redis://HOST:PORT/0}` into the configuration, or give --bus URL; or"
            " `controller: heuristic`, which asks nobody"
        )
    return {
        "bus": bus if asks else None,
        "name": own.name or run,
        "wait_seconds": own.wait_seconds,
        "offset": config.seed,
    }


def _schedule(config: GrowConfig, sites: Sequence[str]) -> dict[str, Any]:
    if not config.schedule_of_grafts:
        return {"every": config.graft_every, "first": config.graft_every, "offset": config.seed}
    return {
        "schedule": [
            {
                "step": own.step,
                "action": own.action.value,
                "layer": sites.index(own.site),
                "seed": own.seed,
                "kernel": own.candidate if own.kernel is None else own.kernel,
                "alpha": own.alpha,
            }
            for own in config.schedule_of_grafts
        ]
    }


def guard_of(config: GrowConfig) -> Guard:
    """The rules that every decision must pass."""
    return Guard(Safety(**config.safety.model_dump()))

"""Controllers and triggers by name, from plain values."""

import inspect
from collections.abc import Mapping
from typing import Any

from esper.errors import InputError
from esper.tamiyo._asking import ServiceController
from esper.tamiyo._bandit import BanditController
from esper.tamiyo._check import require_keys, require_one_of
from esper.tamiyo._controller import Action, Controller
from esper.tamiyo._fixed import FixedController, Scheduled
from esper.tamiyo._gradient_bottleneck import GradientBottleneckTrigger
from esper.tamiyo._held_out_gain import HeldOutGainTrigger
from esper.tamiyo._heuristic import HeuristicController
from esper.tamiyo._learned import LearnedController
from esper.tamiyo._plateau import PlateauTrigger
from esper.tamiyo._random import RandomController
from esper.tamiyo._random_trigger import RandomTrigger
from esper.tamiyo._schedule_trigger import ScheduleTrigger
from esper.tamiyo._trigger import Trigger

TRIGGERS: dict[str, type] = {
    "plateau": PlateauTrigger,
    "gradient_bottleneck": GradientBottleneckTrigger,
    "held_out_gain": HeldOutGainTrigger,
    "schedule": ScheduleTrigger,
    "random": RandomTrigger,
}
"""Every kind of trigger."""

CONTROLLERS: dict[str, type | None] = {
    "none": None,
    "fixed": FixedController,
    "random": RandomController,
    "heuristic": HeuristicController,
    "bandit": BanditController,
    "learned": LearnedController,
    "service": ServiceController,
}
"""Every kind of controller; "none" trains without growing."""


def make_trigger(kind: str, **values: Any) -> Trigger:
    """A trigger of a kind of `TRIGGERS`, from its class's own arguments.

    Raises:
        InputError: for a kind, a name or a value that is not known.
    """
    require_one_of("the kind of a trigger", kind, TRIGGERS)
    cls = TRIGGERS[kind]
    require_keys(f"the {kind} trigger", values, _names(cls))
    return cls(**values)


def make_controller(kind: str, **values: Any) -> Controller | None:
    """A controller of a kind of `CONTROLLERS`, from its class's own arguments as plain values.

    A `trigger` is a kind, or a mapping of its kind and its own arguments, such as
    `{"kind": "plateau", "patience": 3}`; "plateau" where it is left out. A `schedule` is a list
    of mappings with the keys of `Scheduled`, such as
    `{"step": 100, "action": "graft", "layer": 0, "kernel": 2}`.

    Returns:
        None for "none".

    Raises:
        InputError: for a kind, a name or a value that is not known.
    """
    require_one_of("the kind of a controller", kind, CONTROLLERS)
    cls = CONTROLLERS[kind]
    names = [] if cls is None else _names(cls)
    require_keys(f"the {kind} controller", values, names)
    if cls is None:
        return None
    if "trigger" in names:
        values["trigger"] = _trigger(values.get("trigger", "plateau"))
    if values.get("schedule") is not None:
        values["schedule"] = _schedule(values["schedule"])
    return cls(**values)


def _names(cls: type) -> list[str]:
    return list(inspect.signature(cls).parameters)


def _trigger(value: Any) -> Trigger:
    if isinstance(value, str):
        return make_trigger(value)
    if isinstance(value, Mapping) and "kind" in value:
        own = {str(key): given for key, given in value.items() if key != "kind"}
        return make_trigger(value["kind"], **own)
    raise InputError(
        "a trigger is a kind, such as 'plateau', or a mapping with its kind, such as"
        f" {{'kind': 'plateau', 'patience': 3}}; got {value!r}"
    )


def _schedule(value: Any) -> list[Scheduled]:
    if not isinstance(value, list | tuple):
        raise InputError(f"a schedule is a list of decisions, got {value!r}")
    return [_scheduled(index, entry) for index, entry in enumerate(value)]


def _scheduled(index: int, entry: Any) -> Scheduled:
    if isinstance(entry, Scheduled):
        return entry
    what = f"decision {index} of the schedule"
    if not isinstance(entry, Mapping):
        raise InputError(
            f"{what} must be a mapping such as {{'step': 100, 'action': 'graft', 'layer': 0}}, got"
            f" {entry!r}"
        )
    require_keys(what, entry, _names(Scheduled))
    missing = [key for key in ("step", "action", "layer") if key not in entry]
    if missing:
        raise InputError(f"{what} lacks {', '.join(missing)}: {dict(entry)!r}")
    require_one_of(f"the action of {what}", entry["action"], list(Action))
    return Scheduled(**{**entry, "action": Action(entry["action"])})

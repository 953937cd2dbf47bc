"""A control: what was written down before the run."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from esper.errors import InputError
from esper.tamiyo._check import require
from esper.tamiyo._controller import Action, Decision, Observation, Veto
from esper.tamiyo._places import NEEDED_STAGE, Place, free_seeds, resets, seeds_in
from esper.tamiyo._timetable import Timetable

_IS_ID = re.compile(r"[0-9a-f]{64}", re.ASCII).fullmatch


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """One decision, written down before the run."""

    step: int
    """It is made at the first boundary at or after it at which the lifecycle allows it."""
    action: Action
    layer: int
    """Row of the site."""
    seed: int | None = None
    """None for the first seed of the layer that the action is legal for."""
    kernel: str | int = 0
    """Of GRAFT: an artifact's id, or which of the layer's candidates, from 0."""
    alpha: float = 1.0
    """Of GRAFT and RETARGET, in [0, 1]."""
    initialisation: str = ""
    """Of GRAFT; "" for the run's own way."""

    def __post_init__(self) -> None:
        what = f"a decision scheduled for step {self.step!r}: its"
        require(f"{what} step", self.step, 0, whole=True)
        require(f"{what} layer", self.layer, 0, whole=True)
        require(f"{what} alpha", self.alpha, 0, 1)
        if self.seed is not None:
            require(f"{what} seed", self.seed, 0, whole=True)
        if not isinstance(self.kernel, str):
            require(f"{what} kernel, where it is no id,", self.kernel, 0, whole=True)
        elif not _IS_ID(self.kernel):
            raise InputError(
                f"{what} kernel must be the 64 lower-case hexadecimal digits of an artifact's id,"
                f" or which of the layer's candidates, from 0; got {self.kernel!r}"
            )
        if self.action is Action.RESET:
            raise InputError(
                f"{what} action is RESET, but seeds in ERROR_RECOVERY are reset at once by every"
                " controller: leave it out"
            )


class FixedController:
    """Makes the decisions of a schedule, whatever the losses are.

    Either a list of decisions, or a graft every so many steps: into the first free seed, layers
    in order of preference, kernels in turn from the `offset`-th candidate on. What is grafted so
    stays and trains to the end of the run.

    A decision that the lifecycle does not allow at its time, or that is vetoed, waits for the
    next boundary; in one boundary at most one is made for each seed. What was done at a step
    that the run went back to, or past, is done again. Of grafts every so many steps, the last
    that came due stands for those that were missed.

    Args:
        schedule: decisions in order of preference.
        every: steps between two grafts, from 1; instead of a schedule.
        first: the step of the first of them, from 0.
        offset: as above, from 0.

    Raises:
        InputError: for values out of range; for both, or neither, of `schedule` and `every`; at
            the first boundary, for a layer or seed that is not there or may not grow; and when a
            graft comes due of a candidate that the layer has not.
    """

    def __init__(
        self,
        *,
        schedule: Sequence[Scheduled] | None = None,
        every: int | None = None,
        first: int = 0,
        offset: int = 0,
    ) -> None:
        if (schedule is None) == (every is None):
            raise InputError(
                "a fixed controller takes either `schedule`, a list of decisions, or `every`, the"
                f" steps between two grafts; got {'neither' if every is None else 'both'}"
            )
        if every is not None:
            require("every", every, 1, whole=True)
        require("first", first, 0, whole=True)
        require("offset", offset, 0, whole=True)
        self._schedule = tuple(schedule or ())
        self._timetable = None if every is None else Timetable(first=first, every=every)
        self._every = every
        self._first = first
        self._offset = offset
        self._done: dict[int, int] = {}
        """The boundary at which each decision of the schedule was made, by its index."""
        self._asked: dict[Place, int] = {}
        """Of the decisions just made: index in the schedule, or which time of the timetable."""

    def decide(self, observation: Observation) -> list[Decision]:
        """Resets, then what is due."""
        self._asked = {}
        self._done = {index: at for index, at in self._done.items() if at < observation.step}
        due = self._due(observation) if self._timetable is None else self._regular(observation)
        return resets(observation) + due

    def _due(self, observation: Observation) -> list[Decision]:
        decisions: list[Decision] = []
        for index, entry in enumerate(self._schedule):
            _check_place(observation, entry)
            if entry.step > observation.step or index in self._done:
                continue
            stage = NEEDED_STAGE[entry.action]
            seed = next(
                (
                    seed
                    for layer, seed in seeds_in(observation, stage)
                    if layer == entry.layer
                    and entry.seed in (None, seed)
                    and (layer, seed) not in self._asked
                ),
                None,
            )
            if seed is None:
                continue
            self._asked[entry.layer, seed] = index
            decisions.append(
                Decision(
                    entry.action,
                    entry.layer,
                    seed,
                    f"scheduled for step {entry.step}",
                    _kernel(observation, entry) if entry.action is Action.GRAFT else "",
                    entry.initialisation,
                    entry.alpha,
                )
            )
        return decisions

    def _regular(self, observation: Observation) -> list[Decision]:
        assert self._timetable is not None
        assert self._every is not None
        time = self._timetable.due(observation.step)
        free = free_seeds(observation)
        if time is None or not free:
            return []
        layer = next(iter(free))
        candidates = observation.candidates[layer]
        kernel = candidates[(self._offset + self._timetable.served) % len(candidates)]
        self._asked[layer, free[layer]] = time
        reason = f"scheduled for step {self._first + time * self._every}"
        return [Decision(Action.GRAFT, layer, free[layer], reason, kernel.kernel_id)]

    def told(
        self, observation: Observation, applied: Sequence[Decision], vetoed: Sequence[Veto]
    ) -> None:
        """See `Controller.told`: what was vetoed is still to be done."""
        for decision in applied:
            index = self._asked.get((decision.layer, decision.seed))
            # What the guard did there by itself is not what was asked for.
            if index is None or decision.action is not self._action(index):
                continue
            if self._timetable is not None:
                self._timetable.serve(index, observation.step)
            else:
                self._done[index] = observation.step
        self._asked = {}

    def _action(self, index: int) -> Action:
        return Action.GRAFT if self._timetable is not None else self._schedule[index].action

    def state(self) -> dict[str, Any]:
        """See `Controller.state`."""
        return {
            "done": [list(pair) for pair in sorted(self._done.items())],
            "asked": [[*place, index] for place, index in sorted(self._asked.items())],
            "served": [] if self._timetable is None else self._timetable.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller.restore`."""
        self._done = {int(index): int(at) for index, at in state["done"]}
        self._asked = {(int(row), int(seed)): int(index) for row, seed, index in state["asked"]}
        if self._timetable is not None:
            self._timetable.restore(state["served"])


def _check_place(observation: Observation, entry: Scheduled) -> None:
    layers, seeds = observation.seeds.shape
    if entry.layer >= layers or (entry.seed or 0) >= seeds:
        raise InputError(
            f"a decision is scheduled for seed {entry.seed or 0} of layer {entry.layer}, and there"
            f" are {layers} layers of {seeds} seeds, counted from 0: name one of those"
        )
    if entry.action is Action.GRAFT and entry.layer not in observation.candidates:
        may = ", ".join(f"{row} ({observation.sites[row]})" for row in observation.candidates)
        raise InputError(
            f"a graft is scheduled for layer {entry.layer} ({observation.sites[entry.layer]}),"
            f" which may not grow: choose among {may or 'none'}"
        )


def _kernel(observation: Observation, entry: Scheduled) -> str:
    if isinstance(entry.kernel, str):
        return entry.kernel
    candidates = observation.candidates[entry.layer]
    if entry.kernel >= len(candidates):
        site = observation.sites[entry.layer]
        raise InputError(
            f"a graft scheduled for step {entry.step} asks for candidate {entry.kernel} of {site},"
            f" counted from 0, and there are {len(candidates)}: name another, or a kernel's id"
        )
    return candidates[entry.kernel].kernel_id

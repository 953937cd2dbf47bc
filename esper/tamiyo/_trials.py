"""Kernels on trial: grafted, and not yet judged."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esper.tamiyo._controller import Action, Decision, Observation
from esper.tamiyo._places import Place, holds, seeds_in
from esper.urza import KernelRecord
from esper_functional import SeedLifecycleState, kernel_id_words


class Trial(NamedTuple):
    """One kernel on trial."""

    since: int
    """The step at which it was asked for."""
    kernel_id: str
    """"" where it is none of the candidates."""
    blueprint: str


class Trials:
    """The kernels on trial, by place, kept true to what the seeds say.

    A trial begins when a graft is applied and ends when its seed is emptied or fossilised. Seeds
    have the last word: a kernel that is there and not on trial, as after the run went back past
    its end, is on trial from then on; a trial whose seed holds another kernel, or was begun at
    a step that is yet to come, is over.
    """

    def __init__(self) -> None:
        self._open: dict[Place, Trial] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def places(self) -> list[Place]:
        """Where trials are, by row and seed."""
        return sorted(self._open)

    def at(self, place: Place) -> Trial | None:
        """The trial of a seed."""
        return self._open.get(place)

    def follow(self, observation: Observation) -> list[tuple[Place, Trial]]:
        """Bring the trials in line with the seeds, before anything is decided.

        Returns:
            Those whose seeds are DORMANT although nobody emptied them: their kernels could not
            be loaded. What was taken back is not among them.
        """
        lost: list[tuple[Place, Trial]] = []
        stages = np.asarray(observation.seeds.stage).tolist()
        words = np.asarray(observation.seeds.kernel_id).tolist()
        for (layer, seed), trial in sorted(self._open.items()):
            stage = SeedLifecycleState(stages[layer][seed])
            other = trial.kernel_id and kernel_id_words(trial.kernel_id) != tuple(
                words[layer][seed]
            )
            if trial.since >= observation.step or stage is SeedLifecycleState.FOSSILIZED:
                del self._open[layer, seed]
            elif stage is SeedLifecycleState.DORMANT:
                del self._open[layer, seed]
                lost.append(((layer, seed), trial))
            elif other:
                del self._open[layer, seed]
        for place in seeds_in(observation, SeedLifecycleState.LOADING, SeedLifecycleState.ACTIVE):
            if place not in self._open:
                kernel_id, blueprint = _known(observation, place)
                self._open[place] = Trial(observation.step, kernel_id, blueprint)
        return lost

    def ripe(self, observation: Observation, steps: int) -> list[Place]:
        """The ACTIVE seeds on trial for at least `steps`."""
        active = set(seeds_in(observation, SeedLifecycleState.ACTIVE))
        return [
            place
            for place, trial in sorted(self._open.items())
            if place in active and observation.step - trial.since >= steps
        ]

    def told(
        self, observation: Observation, applied: Iterable[Decision]
    ) -> list[tuple[Decision, Trial]]:
        """Begin and end trials by the decisions that were applied.

        Returns:
            Those that ended, with what ended them.
        """
        ended: list[tuple[Decision, Trial]] = []
        for decision in applied:
            place = (decision.layer, decision.seed)
            if decision.action is Action.GRAFT:
                blueprint = blueprint_of(
                    observation.candidates.get(decision.layer, ()), decision.kernel_id
                )
                self._open[place] = Trial(observation.step, decision.kernel_id, blueprint)
            elif decision.action is not Action.RETARGET and place in self._open:
                ended.append((decision, self._open.pop(place)))
        return ended

    def state(self) -> dict[str, Any]:
        """What is on trial, as JSON values."""
        return {f"{layer},{seed}": list(t) for (layer, seed), t in sorted(self._open.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        self._open = {}
        for key, (since, kernel_id, blueprint) in state.items():
            layer, seed = (int(part) for part in key.split(","))
            self._open[layer, seed] = Trial(int(since), str(kernel_id), str(blueprint))


def by_blueprint(candidates: Sequence[KernelRecord]) -> dict[str, list[KernelRecord]]:
    """Candidates by their blueprints, both in the order in which they come."""
    groups: dict[str, list[KernelRecord]] = {}
    for record in candidates:
        groups.setdefault(record.blueprint, []).append(record)
    return groups


def blueprint_of(candidates: Sequence[KernelRecord], kernel_id: str) -> str:
    """The blueprint of a candidate; "" for a kernel that is none."""
    return next((r.blueprint for r in candidates if r.kernel_id == kernel_id), "")


def _known(observation: Observation, place: Place) -> tuple[str, str]:
    for record in observation.candidates.get(place[0], ()):
        if holds(observation, place, record.kernel_id):
            return record.kernel_id, record.blueprint
    return "", ""

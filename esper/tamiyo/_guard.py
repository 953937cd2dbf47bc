"""The guard: what was allowed, when sites changed, and which kernels do harm."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from esper.tamiyo._controller import Action, Decision, Observation, Veto, Worth
from esper.tamiyo._places import Place
from esper.tamiyo._review import Review
from esper.tamiyo._safety import Safety
from esper_functional import SeedLifecycleState


class Guard:
    """Reviews decisions by `Safety`; remembers what it allowed, and when sites changed.

    Stages are seen at boundaries, so a kernel that became ACTIVE between two of them is a change
    at the second. Where the run goes back, what was allowed from that step on is forgotten, and
    a site that changed since then counts as changed now.
    """

    def __init__(self, safety: Safety) -> None:
        self._safety = safety
        self._stages: list[list[int]] | None = None
        """After the boundary before, what was allowed there included."""
        self._changed: dict[int, int] = {}
        """The step of the last change of a stage, by layer row."""
        self._allowed: list[int] = []
        """The steps of all that `rate` counts: a run that goes back may need the old ones again."""
        self._judged: dict[Place, int] = {}
        """When ACTIVE kernels were judged last, or came to work."""
        self._rollbacks = 0
        self._step: int | None = None
        self._vetoes = Counter[str]()

    @property
    def vetoes(self) -> Mapping[str, int]:
        """How many decisions each rule has refused, by its name; rules without any are not in it.

        A run that goes back restores what the guard remembered, and so forgets those since.
        """
        return dict(sorted(self._vetoes.items()))

    def count(self, vetoes: Sequence[Veto]) -> None:
        """Count what was refused by a rule that is not the guard's own."""
        self._vetoes.update(veto.rule for veto in vetoes)

    def review(
        self,
        observation: Observation,
        decisions: Sequence[Decision],
        unusable: Callable[[int, str], str | None] | None = None,
    ) -> tuple[list[Decision], list[Veto]]:
        """Which of a boundary's decisions are allowed, and why the others are not.

        Among those that are allowed, the first, may be UNLOADs of the guard's own.
        Decisions are reviewed in their order, and what was allowed counts for those that follow:
        so none is refused for the sake of a later one. What an UNLOAD frees is counted once it
        is free, at the next boundary. To be called at every boundary, also without decisions.

        Args:
            unusable: why a kernel cannot be grafted in a layer row; None where it can. Without
                it, those can be that are candidates.
        """
        stages = self._look(observation)
        decisions = [*self._harmful(observation, decisions), *decisions]
        review = Review(
            self._safety,
            observation,
            stages,
            unusable or _no_candidate(observation),
            self._changed,
            self._allowed,
            *map(float, observation.now),
        )
        allowed: list[Decision] = []
        vetoes: list[Veto] = []
        for decision in decisions:
            veto = review.veto(decision)
            if veto is None:
                review.allow(decision)
                allowed.append(decision)
            else:
                vetoes.append(veto)
        self.count(vetoes)
        return allowed, vetoes

    def _look(self, observation: Observation) -> list[list[int]]:
        """Take note of what has changed; returns the stages, to be kept up to date."""
        step = observation.step
        went_back = len(observation.rollbacks) > self._rollbacks
        if went_back or (self._step is not None and step < self._step):
            self._allowed = [at for at in self._allowed if at < step]
            self._changed = {layer: min(at, step) for layer, at in self._changed.items()}
            self._judged = {place: min(at, step) for place, at in self._judged.items()}
        stages = np.asarray(observation.seeds.stage).astype(int).tolist()
        self._follow_work(stages, step)
        if self._stages is not None:
            for layer, (before, now) in enumerate(zip(self._stages, stages, strict=True)):
                if before != now:
                    self._changed[layer] = step
        self._stages = stages
        self._rollbacks = len(observation.rollbacks)
        self._step = step
        return stages

    def _follow_work(self, stages: list[list[int]], step: int) -> None:
        at_work = set(_places(stages, SeedLifecycleState.ACTIVE))
        before = set(_places(self._stages or [], SeedLifecycleState.ACTIVE))
        since = {place: self._judged[place] for place in at_work & before if place in self._judged}
        self._judged = {place: since.get(place, step) for place in sorted(at_work)}

    def _harmful(self, observation: Observation, decisions: Sequence[Decision]) -> list[Decision]:
        """UNLOADs of the kernels that are due and do harm, but for those that are asked for."""
        least = self._safety.unload_below_worth
        if least is None:
            return []
        step, wait = observation.step, self._safety.judge_after_steps
        unloads = {(d.layer, d.seed) for d in decisions if d.action is Action.UNLOAD}
        idle = np.asarray(observation.seeds.incubating) | np.asarray(observation.seeds.fallback)
        due = [
            place
            for place, at in self._judged.items()
            if step - at >= wait and place not in unloads and not idle[place]
        ]
        if not due:
            return []
        measured = (
            {place: observation.worth(*place) for place in due}
            if observation.worths is None
            else observation.worths(due)
        )
        self._judged |= dict.fromkeys(due, step)
        return [
            Decision(Action.UNLOAD, *place, _harm(measured[place], least))
            for place in due
            if measured[place].high < -least
        ]

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        return {
            "stages": None if self._stages is None else [list(row) for row in self._stages],
            "changed": {str(layer): at for layer, at in sorted(self._changed.items())},
            "allowed": list(self._allowed),
            "judged": [[*place, at] for place, at in sorted(self._judged.items())],
            "rollbacks": self._rollbacks,
            "step": self._step,
            "vetoes": dict(self.vetoes),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        stages = state["stages"]
        self._stages = None if stages is None else [[int(s) for s in row] for row in stages]
        self._changed = {int(layer): int(at) for layer, at in state["changed"].items()}
        self._allowed = [int(at) for at in state["allowed"]]
        # Runs of before kept none: their kernels begin anew.
        judged = state.get("judged", ())
        self._judged = {(int(layer), int(seed)): int(at) for layer, seed, at in judged}
        self._vetoes = Counter({str(k): int(n) for k, n in state.get("vetoes", {}).items()})
        self._rollbacks = int(state["rollbacks"])
        self._step = None if state["step"] is None else int(state["step"])


def _places(stages: list[list[int]], stage: SeedLifecycleState) -> list[Place]:
    return [
        (layer, seed)
        for layer, row in enumerate(stages)
        for seed, own in enumerate(row)
        if own == stage
    ]


def _harm(worth: Worth, least: float) -> str:
    return (
        f"it does harm: without it the validation loss rises by {worth.value:.4g}"
        f" ({worth.low:.4g} to {worth.high:.4g}), and what is below {-least:g} is unloaded"
    )


def _no_candidate(observation: Observation) -> Callable[[int, str], str | None]:
    def unusable(layer: int, kernel_id: str) -> str | None:
        if any(record.kernel_id == kernel_id for record in observation.candidates[layer]):
            return None
        return f"kernel {kernel_id[:12]} is no candidate for {observation.sites[layer]}"

    return unusable

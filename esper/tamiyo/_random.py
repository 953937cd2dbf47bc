"""A control: grafts and verdicts by chance."""

from collections.abc import Mapping, Sequence
from typing import Any

from esper.tamiyo._check import require
from esper.tamiyo._controller import Action, Decision, Observation, Veto
from esper.tamiyo._places import Place, free_seeds, resets
from esper.tamiyo._trials import Trials


class RandomController:
    """Does what a controller does, at given rates and without looking at any loss.

    At a boundary it grafts with probability `grafts`: a layer uniformly among those with a free
    seed, a kernel uniformly among its candidates. When a kernel's trial is over it is fossilised
    with probability `keep`, and unloaded otherwise; the draw is made once for a trial, so a
    verdict that is vetoed is not drawn again until it suits. All draws come from the
    observation's generator.

    With `max_grafts` it spends as many grafts as the controller that it is a control for: grafts
    that were applied count, and those that the run took back do not.

    Args:
        grafts: probability of a graft at a boundary, in [0, 1].
        keep: probability that a kernel stays, in [0, 1].
        trial_steps: steps from the graft to the verdict, from 1.
        trials: kernels on trial at once at most, from 1; None for no bound.
        max_grafts: grafts of the whole run, from 0; None for no bound.

    Raises:
        InputError: for values out of range.
    """

    def __init__(
        self,
        *,
        grafts: float = 0.1,
        keep: float = 0.5,
        trial_steps: int = 400,
        trials: int | None = None,
        max_grafts: int | None = None,
    ) -> None:
        require("grafts", grafts, 0, 1)
        require("keep", keep, 0, 1)
        require("trial_steps", trial_steps, 1, whole=True)
        if trials is not None:
            require("trials", trials, 1, whole=True)
        if max_grafts is not None:
            require("max_grafts", max_grafts, 0, whole=True)
        self._rate = grafts
        self._keep = keep
        self._trial_steps = trial_steps
        self._most_trials = trials
        self._max_grafts = max_grafts
        self._trials = Trials()
        self._grafted: list[int] = []
        """The steps of the grafts so far."""
        self._drawn: dict[Place, float] = {}
        """What was drawn for trials whose verdict is not yet applied."""

    def decide(self, observation: Observation) -> list[Decision]:
        """Resets, verdicts by chance, then perhaps a graft."""
        self._grafted = [step for step in self._grafted if step < observation.step]
        self._trials.follow(observation)
        ripe = self._trials.ripe(observation, self._trial_steps)
        self._drawn = {place: drawn for place, drawn in self._drawn.items() if place in ripe}
        verdicts = [self._verdict(observation, place) for place in ripe]
        return resets(observation) + verdicts + self._graft(observation)

    def _verdict(self, observation: Observation, place: Place) -> Decision:
        if place not in self._drawn:
            self._drawn[place] = float(observation.random.random())
        drawn = self._drawn[place]
        keep = drawn < self._keep
        compared = "below" if keep else "not below"
        reason = f"by chance: drew {drawn:.4g}, {compared} {self._keep:g}"
        return Decision(Action.FOSSILIZE if keep else Action.UNLOAD, *place, reason)

    def _graft(self, observation: Observation) -> list[Decision]:
        drawn = float(observation.random.random())
        spent = self._max_grafts is not None and len(self._grafted) >= self._max_grafts
        full = self._most_trials is not None and len(self._trials) >= self._most_trials
        free = free_seeds(observation)
        if drawn >= self._rate or spent or full or not free:
            return []
        layers = list(free)
        layer = layers[int(observation.random.integers(len(layers)))]
        candidates = observation.candidates[layer]
        kernel = candidates[int(observation.random.integers(len(candidates)))]
        reason = f"by chance: drew {drawn:.4g}, below {self._rate:g}"
        return [Decision(Action.GRAFT, layer, free[layer], reason, kernel.kernel_id)]

    def told(
        self, observation: Observation, applied: Sequence[Decision], vetoed: Sequence[Veto]
    ) -> None:
        """See `Controller.told`."""
        for decision, _ in self._trials.told(observation, applied):
            self._drawn.pop((decision.layer, decision.seed), None)
        grafts = sum(decision.action is Action.GRAFT for decision in applied)
        self._grafted += [observation.step] * grafts

    def state(self) -> dict[str, Any]:
        """See `Controller.state`."""
        return {
            "trials": self._trials.state(),
            "grafted": list(self._grafted),
            "drawn": [[*place, drawn] for place, drawn in sorted(self._drawn.items())],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller.restore`."""
        self._trials.restore(state["trials"])
        self._grafted = [int(step) for step in state["grafted"]]
        self._drawn = {(int(row), int(seed)): float(u) for row, seed, u in state["drawn"]}

"""A controller by rule: graft when a trigger says so, keep what is worth it.

A graft goes into the first free seed. The kernel ramps up and trains; after its trial its
removal cost is measured on held-out data, and it is fossilised or unloaded by that. A layer
that a kernel has failed gets the next blueprint.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from esper.tamiyo._check import require
from esper.tamiyo._controller import Action, Decision, Observation, Veto
from esper.tamiyo._places import Place, free_seeds, resets
from esper.tamiyo._trials import Trial, Trials, by_blueprint
from esper.tamiyo._trigger import Cue, Trigger
from esper.tamiyo._verdict import Side, VerdictRule


class HeuristicController:
    """See the module.

    It makes one graft a cue, in the layer that the cue names, or else in the first one with a
    free seed. Kernels of a blueprint are taken in turn, one further with each graft. A blueprint
    has failed a layer when its kernel there was unloaded, could not be loaded, or had to be
    reset; the next one is tried, and after the last the first again.

    A verdict and a graft have the trigger measure anew: the network is another one then.

    Args:
        trigger: says when to graft, and perhaps where.
        enough_loss: training loss at or below which nothing is grafted, from 0.
        trial_steps: steps from the graft to the verdict, loading and ramp included, from 1.
        min_worth: removal cost above which a kernel is kept.
        judge_by: "value", or "low" for the lower end of its 95 % interval.
        trials: kernels on trial at once at most, from 1.
        offset: where in a blueprint's candidates to begin, from 0, so that runs of other seeds
            meet other kernels.

    Raises:
        InputError: for values out of range.
    """

    def __init__(
        self,
        *,
        trigger: Trigger,
        enough_loss: float = 0.0,
        trial_steps: int = 400,
        min_worth: float = 0.0,
        judge_by: Side = "value",
        trials: int = 1,
        offset: int = 0,
    ) -> None:
        require("enough_loss", enough_loss, 0)
        require("trial_steps", trial_steps, 1, whole=True)
        require("trials", trials, 1, whole=True)
        require("offset", offset, 0, whole=True)
        self._trigger = trigger
        self._enough_loss = enough_loss
        self._trial_steps = trial_steps
        self._rule = VerdictRule(min_worth, judge_by)
        self._most_trials = trials
        self._offset = offset
        self._trials = Trials()
        self._grafts = 0
        self._failures: dict[int, int] = {}
        """By layer row, how many blueprints in turn have failed it."""

    def decide(self, observation: Observation) -> list[Decision]:
        """Resets, verdicts on finished trials, then at most one graft."""
        for place, trial in self._trials.follow(observation):
            self._failed(observation, place, trial)
        ripe = self._trials.ripe(observation, self._trial_steps)
        verdicts = [self._rule.judge(observation, place).decision for place in ripe]
        if verdicts:
            self._trigger.reset()
        cue = self._trigger.cue(observation)
        return resets(observation) + verdicts + self._grafts_on(observation, cue)

    def _grafts_on(self, observation: Observation, cue: Cue | None) -> list[Decision]:
        if cue is None or len(self._trials) >= self._most_trials:
            return []
        loss = observation.train_loss
        if not (math.isfinite(loss) and loss > self._enough_loss):
            return []
        free = free_seeds(observation)
        layer = next(iter(free), None) if cue.layer is None else cue.layer
        if layer is None or layer not in free:
            return []
        groups = by_blueprint(observation.candidates[layer])
        blueprint = self._blueprint(layer, list(groups))
        kernels = groups[blueprint]
        kernel = kernels[(self._offset + self._grafts) % len(kernels)]
        failures = self._failures.get(layer, 0)
        retry = f"; {blueprint} after {failures} failed here" if failures else ""
        return [
            Decision(
                Action.GRAFT,
                layer,
                free[layer],
                cue.reason + retry,
                kernel.kernel_id,
                confidence=kernel.confidence,
            )
        ]

    def _blueprint(self, layer: int, names: Sequence[str]) -> str:
        return names[self._failures.get(layer, 0) % len(names)]

    def _failed(self, observation: Observation, place: Place, trial: Trial) -> None:
        layer = place[0]
        names = list(by_blueprint(observation.candidates.get(layer, ())))
        # Of two kernels of a blueprint on trial at once, the second failure tells nothing new.
        if names and trial.blueprint == self._blueprint(layer, names):
            self._failures[layer] = self._failures.get(layer, 0) + 1

    def told(
        self, observation: Observation, applied: Sequence[Decision], vetoed: Sequence[Veto]
    ) -> None:
        """See `Controller.told`: what was vetoed was not done, and is decided anew."""
        for decision, trial in self._trials.told(observation, applied):
            if decision.action in (Action.UNLOAD, Action.RESET):
                self._failed(observation, (decision.layer, decision.seed), trial)
        grafts = sum(decision.action is Action.GRAFT for decision in applied)
        self._grafts += grafts
        if grafts:
            self._trigger.reset()

    def state(self) -> dict[str, Any]:
        """See `Controller.state`."""
        return {
            "trigger": self._trigger.state(),
            "grafts": self._grafts,
            "failures": {str(layer): count for layer, count in self._failures.items()},
            "trials": self._trials.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller.restore`."""
        self._trigger.restore(state["trigger"])
        self._grafts = int(state["grafts"])
        self._failures = {int(layer): int(count) for layer, count in state["failures"].items()}
        self._trials.restore(state["trials"])

"""A controller that learns within a run which blueprint pays in which layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from esper.tamiyo._arms import Arm, DiscountedUcb, trial_reward
from esper.tamiyo._check import require
from esper.tamiyo._controller import Action, Decision, Observation, Veto
from esper.tamiyo._places import Place, free_seeds, resets
from esper.tamiyo._trials import Trial, Trials, by_blueprint
from esper.tamiyo._trigger import Cue, Trigger
from esper.tamiyo._verdict import Side, VerdictRule


class BanditController:
    """Chooses layer and blueprint of each graft by discounted UCB; see `DiscountedUcb`.

    An arm is a layer and a blueprint. One is played by a graft when the trigger gives a cue,
    among those with a free seed, in the layer that the cue names where it names one; of the
    blueprint's kernels one is drawn. What it gave is known at the end of the trial, as
    `trial_reward`: 0 for a kernel that could not be loaded or had to be reset. An arm on trial
    waits until it is known, unless there is no other. What was learnt stays when a run goes back.

    Kernels are kept and unloaded by the same rule as `HeuristicController`'s.

    Args:
        trigger: says when to graft, and perhaps where.
        exploration: ξ of the bound, from 0; 2 is UCB1's.
        discount: by which what was learnt fades at each reward, in (0, 1]; a network that grows
            makes old rewards stale.
        price: share of the loss that as many parameters as the host has must earn, from 0.
        enough_loss: training loss at or below which nothing is grafted, from 0.
        trial_steps: steps from the graft to the verdict, loading and ramp included, from 1.
        min_worth: removal cost above which a kernel is kept.
        judge_by: "value", or "low" for the lower end of its 95 % interval.
        trials: kernels on trial at once at most, from 1.

    Raises:
        InputError: for values out of range.
    """

    def __init__(
        self,
        *,
        trigger: Trigger,
        exploration: float = 2.0,
        discount: float = 0.95,
        price: float = 0.01,
        enough_loss: float = 0.0,
        trial_steps: int = 400,
        min_worth: float = 0.0,
        judge_by: Side = "value",
        trials: int = 1,
    ) -> None:
        require("exploration", exploration, 0)
        require("discount", discount, 1e-3, 1)
        require("price", price, 0)
        require("enough_loss", enough_loss, 0)
        require("trial_steps", trial_steps, 1, whole=True)
        require("trials", trials, 1, whole=True)
        self._trigger = trigger
        self._arms = DiscountedUcb(exploration=exploration, discount=discount)
        self._price = price
        self._enough_loss = enough_loss
        self._trial_steps = trial_steps
        self._rule = VerdictRule(min_worth, judge_by)
        self._most_trials = trials
        self._trials = Trials()
        self._rewards: dict[Place, float] = {}
        """Of trials whose verdict is asked for and not yet applied."""

    def decide(self, observation: Observation) -> list[Decision]:
        """Resets, verdicts on finished trials, then at most one graft."""
        for (layer, _), trial in self._trials.follow(observation):
            self._learn(layer, trial, 0.0)
        ripe = self._trials.ripe(observation, self._trial_steps)
        self._rewards = {}
        verdicts = [self._verdict(observation, place) for place in ripe]
        if verdicts:
            self._trigger.reset()
        cue = self._trigger.cue(observation)
        return resets(observation) + verdicts + self._grafts_on(observation, cue)

    def _verdict(self, observation: Observation, place: Place) -> Decision:
        verdict = self._rule.judge(observation, place)
        trial = self._trials.at(place)
        records = observation.candidates.get(place[0], ())
        for record in records:
            if trial is not None and record.kernel_id == trial.kernel_id:
                self._rewards[place] = trial_reward(
                    verdict.worth.value,
                    observation.validation_loss,
                    parameters=record.parameter_count,
                    host_parameters=observation.host.parameters,
                    price=self._price,
                )
        return verdict.decision

    def _learn(self, layer: int, trial: Trial, reward: float) -> None:
        if trial.blueprint:
            self._arms.record((layer, trial.blueprint), reward)

    def _grafts_on(self, observation: Observation, cue: Cue | None) -> list[Decision]:
        if cue is None or len(self._trials) >= self._most_trials:
            return []
        loss = observation.train_loss
        if not (math.isfinite(loss) and loss > self._enough_loss):
            return []
        free = free_seeds(observation)
        layers = [layer for layer in free if cue.layer in (None, layer)]
        groups = {layer: by_blueprint(observation.candidates[layer]) for layer in layers}
        arms: list[Arm] = [(layer, name) for layer in layers for name in groups[layer]]
        if not arms:
            return []
        running = {place: self._trials.at(place) for place in self._trials.places}
        busy = {(place[0], trial.blueprint) for place, trial in running.items() if trial}
        arm = self._arms.choose(arms, busy, observation.random)
        layer, blueprint = arm
        kernels = groups[layer][blueprint]
        kernel = kernels[int(observation.random.integers(len(kernels)))]
        return [
            Decision(
                Action.GRAFT,
                layer,
                free[layer],
                f"{cue.reason}; {blueprint} here: {self._arms.describe(arm)}",
                kernel.kernel_id,
                confidence=kernel.confidence,
            )
        ]

    def told(
        self, observation: Observation, applied: Sequence[Decision], vetoed: Sequence[Veto]
    ) -> None:
        """See `Controller.told`: a trial teaches when its end was applied."""
        for decision, trial in self._trials.told(observation, applied):
            reward = self._rewards.pop((decision.layer, decision.seed), None)
            if decision.action is Action.RESET:
                reward = 0.0
            if reward is not None:
                self._learn(decision.layer, trial, reward)
        if any(decision.action is Action.GRAFT for decision in applied):
            self._trigger.reset()

    def state(self) -> dict[str, Any]:
        """See `Controller.state`."""
        return {
            "trigger": self._trigger.state(),
            "arms": self._arms.state(),
            "trials": self._trials.state(),
            "rewards": [[*place, reward] for place, reward in sorted(self._rewards.items())],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller.restore`."""
        self._trigger.restore(state["trigger"])
        self._arms.restore(state["arms"])
        self._trials.restore(state["trials"])
        self._rewards = {(int(row), int(seed)): float(r) for row, seed, r in state["rewards"]}

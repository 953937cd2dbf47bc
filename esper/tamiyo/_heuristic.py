"""A controller by rule: graft on a plateau, keep what is worth it.

When the training loss has stopped falling, it grafts one kernel into the first
free seed. The kernel ramps up and trains; after its trial its removal cost is
measured on held-out data, and it is fossilised or unloaded by that.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from esper.tamiyo._controller import Action, Decision, Observation
from esper_functional import SeedLifecycleState


class HeuristicController:
    """See the module.

    Args:
        patience: boundaries without improvement that make a plateau.
        min_improvement: relative fall of the training loss below its best that counts.
        enough_loss: training loss below which nothing is grafted.
        trial_steps: steps from the graft to the verdict, ramp included.
        min_worth: removal cost above which a kernel is kept.
        offset: where in the list of candidates to begin, so that runs of other seeds
            meet other kernels.
    """

    def __init__(
        self,
        *,
        patience: int,
        min_improvement: float,
        enough_loss: float,
        trial_steps: int,
        min_worth: float,
        offset: int,
    ) -> None:
        self._patience = patience
        self._min_improvement = min_improvement
        self._enough_loss = enough_loss
        self._trial_steps = trial_steps
        self._min_worth = min_worth
        self._offset = offset
        self._best = math.inf
        self._stale = 0
        self._grafts = 0
        self._trials: dict[str, int] = {}
        """When each seed on trial was asked for, by "layer,seed"."""

    def state(self) -> dict[str, Any]:
        """See `Controller.state`."""
        return {
            "best": None if math.isinf(self._best) else self._best,
            "stale": self._stale,
            "grafts": self._grafts,
            "trials": dict(self._trials),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller.restore`."""
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._stale = int(state["stale"])
        self._grafts = int(state["grafts"])
        self._trials = {str(k): int(v) for k, v in state["trials"].items()}

    def decide(self, observation: Observation) -> list[Decision]:
        """Verdicts on finished trials, then at most one graft."""
        decisions = self._verdicts(observation)
        self._watch(observation.train_loss)
        plateau = self._stale >= self._patience
        if plateau and not self._trials and observation.train_loss > self._enough_loss:
            decisions += self._graft(observation)
        return decisions

    def _watch(self, loss: float) -> None:
        if loss < self._best * (1.0 - self._min_improvement):
            self._best, self._stale = loss, 0
        else:
            self._stale += 1

    def _verdicts(self, observation: Observation) -> list[Decision]:
        decisions: list[Decision] = []
        for key, since in sorted(self._trials.items()):
            layer, seed = (int(part) for part in key.split(","))
            stage = SeedLifecycleState(int(observation.seeds.stage[layer, seed]))
            if stage is SeedLifecycleState.ERROR_RECOVERY:
                del self._trials[key]
                reason = "its output was not finite three times in a row"
                decisions.append(Decision(Action.RESET, layer, seed, reason))
            elif stage is SeedLifecycleState.DORMANT:
                del self._trials[key]
            elif observation.step - since >= self._trial_steps:
                del self._trials[key]
                decisions.append(self._verdict(observation, layer, seed))
                # The plateau is measured anew: the network is another one now.
                self._best, self._stale = math.inf, 0
        return decisions

    def _verdict(self, observation: Observation, layer: int, seed: int) -> Decision:
        worth = observation.worth(layer, seed)
        keep = worth > self._min_worth
        told = f"validation loss rises by {worth:.4g} without it"
        reason = f"{told}, {'more' if keep else 'not more'} than {self._min_worth:g}"
        return Decision(Action.FOSSILIZE if keep else Action.UNLOAD, layer, seed, reason)

    def _graft(self, observation: Observation) -> list[Decision]:
        stages = np.asarray(observation.seeds.stage)
        for layer, candidates in observation.candidates.items():
            free = np.flatnonzero(stages[layer] == SeedLifecycleState.DORMANT)
            if len(free) and candidates:
                kernel = candidates[(self._offset + self._grafts) % len(candidates)]
                seed = int(free[0])
                self._grafts += 1
                self._trials[f"{layer},{seed}"] = observation.step
                reason = (
                    f"training loss {observation.train_loss:.4g} has not fallen by"
                    f" {self._min_improvement:.0%} for {self._stale} boundaries"
                )
                return [Decision(Action.GRAFT, layer, seed, reason, kernel.kernel_id)]
        return []

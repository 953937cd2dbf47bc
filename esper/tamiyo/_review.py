"""The rules of safety, applied to the decisions of one boundary."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from esper.tamiyo._controller import Action, Decision, Observation, Veto
from esper.tamiyo._places import NEEDED_STAGE
from esper.tamiyo._safety import ADAPTATIONS, RULES, Safety
from esper_functional import SeedLifecycleState

_LEADS_TO: Mapping[Action, SeedLifecycleState] = {
    Action.GRAFT: SeedLifecycleState.LOADING,
    Action.FOSSILIZE: SeedLifecycleState.FOSSILIZED,
    Action.UNLOAD: SeedLifecycleState.DORMANT,
    Action.RESET: SeedLifecycleState.DORMANT,
}
"""The stage after an action; RETARGET changes none."""


@dataclasses.dataclass
class Review:
    """One boundary's: the guard's memory, which it writes to, and what is asked for so far."""

    safety: Safety
    observation: Observation
    stages: list[list[int]]
    unusable: Callable[[int, str], str | None]
    changed: dict[int, int]
    allowed: list[int]
    parameters: float
    flops: float

    def veto(self, decision: Decision) -> Veto | None:
        """The first rule that the decision fails, by the order of `RULES`; None if it passes."""
        rules: Mapping[str, Callable[[Decision], str | None]] = {
            "legal": self._legal,
            "calm": self._calm,
            "stability": self._stability,
            "cooldown": self._cooldown,
            "rate": self._rate,
            "confidence": self._confidence,
            "uncertainty": self._uncertainty,
            "parameters": self._parameters,
            "flops": self._flops,
        }
        for rule, actions in RULES.items():
            if decision.action in actions:
                reason = rules[rule](decision)
                if reason is not None:
                    return Veto(decision, rule, reason)
        return None

    def allow(self, decision: Decision) -> None:
        """Count the decision for those that follow."""
        if decision.action in _LEADS_TO:
            # It is a change now, and none when the next boundary sees it.
            self.stages[decision.layer][decision.seed] = int(_LEADS_TO[decision.action])
            self.changed[decision.layer] = self.observation.step
        if decision.action in ADAPTATIONS:
            self.allowed.append(self.observation.step)
        if decision.action is Action.GRAFT:
            parameters, flops = self._cost(decision)
            self.parameters += parameters
            self.flops += flops

    def _cost(self, decision: Decision) -> tuple[float, float]:
        """Parameters and FLOPs of the kernel; infinite where it is no candidate."""
        for record in self.observation.candidates.get(decision.layer, ()):
            if record.kernel_id == decision.kernel_id:
                return float(record.parameter_count), float(record.flops)
        return math.inf, math.inf

    def _legal(self, decision: Decision) -> str | None:
        layer, seed, action = decision.layer, decision.seed, decision.action
        rows, columns = len(self.stages), len(self.stages[0]) if self.stages else 0
        if not (0 <= layer < rows and 0 <= seed < columns):
            return f"there is no seed {seed} of layer {layer}: seeds are {rows} × {columns}"
        found, needed = SeedLifecycleState(self.stages[layer][seed]), NEEDED_STAGE[action]
        if found is not needed:
            site = self.observation.sites[layer]
            return (
                f"{action} needs a seed that is {needed.name}, and seed {seed} of {site} is"
                f" {found.name}"
            )
        if not 0.0 <= decision.alpha <= 1.0:
            return f"alpha is {decision.alpha:g}, and lies in [0, 1]"
        if action is not Action.GRAFT:
            return None
        if layer not in self.observation.candidates:
            return f"nothing may be grafted in {self.observation.sites[layer]}"
        return self.unusable(layer, decision.kernel_id)

    def _calm(self, decision: Decision) -> str | None:
        if not self.safety.calm_steps or not self.observation.rollbacks:
            return None
        back = max(self.observation.rollbacks)
        until = back + self.safety.calm_steps
        if self.observation.step >= until:
            return None
        return (
            f"the run was taken back from step {back}, and may be changed again from step {until}"
            f" on, {self.safety.calm_steps} steps later; it is at step {self.observation.step}"
        )

    def _stability(self, decision: Decision) -> str | None:
        most, spread = self.safety.max_loss_spread, self.observation.loss_spread
        if most is None or math.isnan(spread) or spread <= most:
            return None
        return (
            f"the training losses since the last boundary spread by {spread:.4g} of their mean,"
            f" and may by {most:g}"
        )

    def _cooldown(self, decision: Decision) -> str | None:
        at = self.changed.get(decision.layer)
        if at is None or self.observation.step - at >= self.safety.cooldown_steps:
            return None
        site = self.observation.sites[decision.layer]
        return (
            f"{site} changed {self.observation.step - at} steps ago, and may change after"
            f" {self.safety.cooldown_steps}"
        )

    def _rate(self, decision: Decision) -> str | None:
        most = self.safety.max_adaptations
        oldest = self.observation.step - self.safety.interval_steps
        recent = sum(at > oldest for at in self.allowed)
        if most is None or recent < most:
            return None
        return (
            f"{recent} changes were allowed in the last {self.safety.interval_steps}"
            f" steps, and no more than {most} may be"
        )

    def _confidence(self, decision: Decision) -> str | None:
        if decision.confidence >= self.safety.min_confidence:
            return None
        return (
            f"confidence is {decision.confidence:.4g}, and must be {self.safety.min_confidence:g}"
        )

    def _uncertainty(self, decision: Decision) -> str | None:
        most, own = self.safety.max_uncertainty, decision.uncertainty
        if most is None or own is None or own <= most:
            return None
        return f"the effect is uncertain by {own:.4g} for want of data, and may be by {most:g}"

    def _parameters(self, decision: Decision) -> str | None:
        bound = _bound(
            self.safety.max_parameters,
            self.safety.max_parameters_factor,
            self.observation.host.parameters,
        )
        return _over("parameters", self.parameters, self._cost(decision)[0], bound)

    def _flops(self, decision: Decision) -> str | None:
        bound = _bound(
            self.safety.max_flops, self.safety.max_flops_factor, self.observation.host.flops
        )
        return _over("FLOPs an example", self.flops, self._cost(decision)[1], bound)


def _bound(absolute: float | None, factor: float | None, host: float) -> float | None:
    bounds = [] if absolute is None else [float(absolute)]
    if factor is not None:
        bounds.append(factor * host)
    return min(bounds, default=None)


def _over(unit: str, now: float, more: float, bound: float | None) -> str | None:
    if bound is None or now + more <= bound:
        return None
    if math.isinf(more):
        return f"what the kernel costs is not known, and no more than {bound:.10g} {unit} may be"
    return (
        f"{now:.10g} {unit}, with what is loading and was just allowed, and {more:.10g} more are"
        f" {now + more:.10g}, and no more than {bound:.10g} may be"
    )

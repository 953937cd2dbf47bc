"""What a controller may not exceed, whatever it decides."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from esper.tamiyo._check import require
from esper.tamiyo._controller import Action, Decision, Observation, Veto
from esper_functional import SeedLifecycleState


@dataclasses.dataclass(frozen=True)
class Safety:
    """Bounds on growth; as it is without arguments, there are none.

    Which rules a decision must pass, in this order; the first one that it fails is recorded:

    | rule       | GRAFT | FOSSILIZE | RETARGET | UNLOAD | RESET |
    |------------|-------|-----------|----------|--------|-------|
    | calm       | yes   | yes       | yes      |        |       |
    | cooldown   | yes   | yes       | yes      |        |       |
    | rate       | yes   | yes       | yes      |        |       |
    | confidence | yes   | yes       | yes      |        |       |
    | parameters | yes   |           |          |        |       |
    | flops      | yes   |           |          |        |       |

    UNLOAD and RESET free resources and make the network more like what it was, so nothing keeps
    them back and they are not counted by `rate`; they do begin a cooldown.

    Raises:
        InputError: for values out of range.
    """

    cooldown_steps: int = 0
    """Steps for which a site is left alone after the last change of a stage in it, from 0."""
    max_adaptations: int | None = None
    """Decisions other than UNLOAD and RESET that are allowed in any `interval_steps`, from 0."""
    interval_steps: int = 1_000
    """From 1: at step t, what was allowed after step t - `interval_steps` counts."""
    min_confidence: float = 0.0
    """Of a decision, in [0, 1]."""
    max_parameters: int | None = None
    """Of the network, kernels that are loading included, from 0."""
    max_parameters_factor: float | None = None
    """The same, over the host's parameters, from 1; of both bounds the lower one holds."""
    max_flops: float | None = None
    """Of a forward pass of one example, counted, from 0."""
    max_flops_factor: float | None = None
    """The same, over the host's FLOPs, from 1."""
    calm_steps: int = 0
    """Steps without growth after a run was taken back, from 0. They are counted from the step
    that it was taken back from, so that it first gets past what went wrong as it is."""

    def __post_init__(self) -> None:
        def check(name: str, least: float, most: float = math.inf, *, whole: bool = False) -> None:
            value = getattr(self, name)
            if value is not None:
                require(f"{name} of the safety rules", value, least, most, whole=whole)

        check("cooldown_steps", 0, whole=True)
        check("max_adaptations", 0, whole=True)
        check("interval_steps", 1, whole=True)
        check("min_confidence", 0, 1)
        check("max_parameters", 0, whole=True)
        check("max_parameters_factor", 1)
        check("max_flops", 0)
        check("max_flops_factor", 1)
        check("calm_steps", 0, whole=True)


_ADAPTATIONS = frozenset({Action.GRAFT, Action.FOSSILIZE, Action.RETARGET})
_LEADS_TO: Mapping[Action, SeedLifecycleState] = {
    Action.GRAFT: SeedLifecycleState.LOADING,
    Action.FOSSILIZE: SeedLifecycleState.FOSSILIZED,
    Action.UNLOAD: SeedLifecycleState.DORMANT,
    Action.RESET: SeedLifecycleState.DORMANT,
}
"""The stage after an action; RETARGET changes none."""

RULES: Mapping[str, frozenset[Action]] = {
    "calm": _ADAPTATIONS,
    "cooldown": _ADAPTATIONS,
    "rate": _ADAPTATIONS,
    "confidence": _ADAPTATIONS,
    "parameters": frozenset({Action.GRAFT}),
    "flops": frozenset({Action.GRAFT}),
}
"""The table of `Safety`: which actions each rule is for, in the order of the rules."""


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
        self._rollbacks = 0
        self._step: int | None = None

    def review(
        self, observation: Observation, decisions: Sequence[Decision]
    ) -> tuple[list[Decision], list[Veto]]:
        """Which of a boundary's decisions are allowed, and why the others are not.

        Decisions are reviewed in their order, and what was allowed counts for those that follow:
        so none is refused for the sake of a later one. What an UNLOAD frees is counted once it
        is free, at the next boundary. To be called at every boundary, also without decisions.
        """
        self._look(observation)
        review = _Review(
            self._safety, observation, self._changed, self._allowed, *map(float, observation.now)
        )
        allowed: list[Decision] = []
        vetoes: list[Veto] = []
        for decision in decisions:
            veto = review.veto(decision)
            if veto is None:
                review.allow(decision)
                allowed.append(decision)
                self._expect(decision)
            else:
                vetoes.append(veto)
        return allowed, vetoes

    def _look(self, observation: Observation) -> None:
        step = observation.step
        went_back = len(observation.rollbacks) > self._rollbacks
        if went_back or (self._step is not None and step < self._step):
            self._allowed = [at for at in self._allowed if at < step]
            self._changed = {layer: min(at, step) for layer, at in self._changed.items()}
        stages = np.asarray(observation.seeds.stage).astype(int).tolist()
        if self._stages is not None:
            for layer, (before, now) in enumerate(zip(self._stages, stages, strict=True)):
                if before != now:
                    self._changed[layer] = step
        self._stages = stages
        self._rollbacks = len(observation.rollbacks)
        self._step = step

    def _expect(self, decision: Decision) -> None:
        """What was allowed is a change now, and none when the next boundary sees it."""
        if self._stages is not None and decision.action in _LEADS_TO:
            self._stages[decision.layer][decision.seed] = int(_LEADS_TO[decision.action])

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        return {
            "stages": None if self._stages is None else [list(row) for row in self._stages],
            "changed": {str(layer): at for layer, at in sorted(self._changed.items())},
            "allowed": list(self._allowed),
            "rollbacks": self._rollbacks,
            "step": self._step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        stages = state["stages"]
        self._stages = None if stages is None else [[int(s) for s in row] for row in stages]
        self._changed = {int(layer): int(at) for layer, at in state["changed"].items()}
        self._allowed = [int(at) for at in state["allowed"]]
        self._rollbacks = int(state["rollbacks"])
        self._step = None if state["step"] is None else int(state["step"])


@dataclasses.dataclass
class _Review:
    """One boundary's: the guard's memory, which it writes to, and what is asked for so far."""

    safety: Safety
    observation: Observation
    changed: dict[int, int]
    allowed: list[int]
    parameters: float
    flops: float

    def veto(self, decision: Decision) -> Veto | None:
        rules: Mapping[str, Callable[[Decision], str | None]] = {
            "calm": self._calm,
            "cooldown": self._cooldown,
            "rate": self._rate,
            "confidence": self._confidence,
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
        if decision.action in _LEADS_TO:
            self.changed[decision.layer] = self.observation.step
        if decision.action in _ADAPTATIONS:
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

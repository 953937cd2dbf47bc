"""What a controller may not exceed, whatever it decides."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from esper.tamiyo._check import require
from esper.tamiyo._controller import Action, Decision, Observation, Veto, Worth
from esper.tamiyo._places import NEEDED_STAGE, Place
from esper_functional import SeedLifecycleState


@dataclasses.dataclass(frozen=True)
class Safety:
    """Bounds on growth; as it is without arguments, there are none.

    Which rules a decision must pass, in this order; the first one that it fails is recorded:

    | rule       | GRAFT | FOSSILIZE | RETARGET | UNLOAD | RESET |
    |------------|-------|-----------|----------|--------|-------|
    | legal      | yes   | yes       | yes      | yes    | yes   |
    | calm       | yes   | yes       | yes      |        |       |
    | stability  | yes   | yes       | yes      |        |       |
    | cooldown   | yes   | yes       | yes      |        |       |
    | rate       | yes   | yes       | yes      |        |       |
    | confidence | yes   | yes       | yes      |        |       |
    | uncertainty | yes  | yes       | yes      |        |       |
    | parameters | yes   |           |          |        |       |
    | flops      | yes   |           |          |        |       |

    `legal` holds always and has no setting: the seed is there and in the stage that the action
    needs, once what was allowed before it is done; a kernel that is grafted can be had and fits.
    UNLOAD and RESET free resources and make the network more like what it was, so nothing else
    keeps them back and they are not counted by `rate`; they do begin a cooldown.

    With `unload_below_worth`, the guard itself asks for the UNLOAD of kernels that do harm, before
    what the controller asks for.

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
    max_uncertainty: float | None = None
    """Standard deviation of a decision's effect for want of data, from 0. A decision that says
    none passes: not every controller estimates effects."""
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
    max_loss_spread: float | None = None
    """Of the steps' training losses since the last boundary: standard deviation over mean, from
    0. What is decided while it is greater is judged by noise. A loss that runs away spreads too,
    and one that rises slowly is overfitting, which is no instability: so there is no second bound,
    of the rise. A spread that is not known passes."""
    unload_below_worth: float | None = None
    """From 0: an ACTIVE kernel is unloaded whose worth is below minus this, of all of its 95 %
    interval. Each measurement costs a pass over held-out data; without it, none is made."""
    judge_after_steps: int = 500
    """From 1: steps at work before a kernel's worth is measured for that, and between that and
    the next time."""

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
        check("max_uncertainty", 0)
        check("max_loss_spread", 0)
        check("unload_below_worth", 0)
        check("judge_after_steps", 1, whole=True)


_ADAPTATIONS = frozenset({Action.GRAFT, Action.FOSSILIZE, Action.RETARGET})
_LEADS_TO: Mapping[Action, SeedLifecycleState] = {
    Action.GRAFT: SeedLifecycleState.LOADING,
    Action.FOSSILIZE: SeedLifecycleState.FOSSILIZED,
    Action.UNLOAD: SeedLifecycleState.DORMANT,
    Action.RESET: SeedLifecycleState.DORMANT,
}
"""The stage after an action; RETARGET changes none."""

RULES: Mapping[str, frozenset[Action]] = {
    "legal": frozenset(Action),
    "calm": _ADAPTATIONS,
    "stability": _ADAPTATIONS,
    "cooldown": _ADAPTATIONS,
    "rate": _ADAPTATIONS,
    "confidence": _ADAPTATIONS,
    "uncertainty": _ADAPTATIONS,
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
        review = _Review(
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


@dataclasses.dataclass
class _Review:
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
        if decision.action in _LEADS_TO:
            # It is a change now, and none when the next boundary sees it.
            self.stages[decision.layer][decision.seed] = int(_LEADS_TO[decision.action])
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

"""A controller that learned: a policy is shown the model graph, and what it chooses is done.

The policy was trained elsewhere; here it is asked, once a boundary, always for its likeliest
choice. What it cannot judge, as of a network unlike any that it has seen, it leaves alone, and
says so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from esper.errors import InputError
from esper.tamiyo._controller import Action, Decision, Observation, Veto, Worth
from esper.tamiyo._places import resets
from esper.tamiyo._recorder import ReadingsRecorder
from esper.tamiyo.graph import ModelGraph, model_graph

_NAMED = 3
"""Features that a reason names, at most."""


class Advice(Protocol):
    """What a policy would do with a network, and what it makes of it; see `LoadedPolicy`."""

    @property
    def choice(self) -> Any:
        """A `Choice` of `esper.tamiyo.policy`; it waits where there is a remark."""
        ...

    @property
    def confidence(self) -> float:
        """Probability, calibrated, that the effect is good; in [0, 1]."""
        ...

    @property
    def epistemic(self) -> float:
        """Standard deviation of the effect for want of data, in units of the reward."""
        ...

    @property
    def aleatoric(self) -> float:
        """The same for what is not seen in a network."""
        ...

    @property
    def effect(self) -> tuple[float, float, float]:
        """What the choice would bring against waiting, and the ends of its 95 % interval."""
        ...

    @property
    def remark(self) -> str:
        """Why it waits although it would have liked to do something; "" otherwise."""
        ...

    @property
    def reasons(self) -> Sequence[tuple[str, float]]:
        """The features that moved it most, the strongest first, each with its part."""
        ...


class Advisor(Protocol):
    """A policy as it is asked; the same graph gets the same advice."""

    def decide(self, graph: ModelGraph) -> Advice:
        """What to do with a network."""
        ...


class LearnedController:
    """See the module. Seeds that have failed are emptied first, whatever the policy says.

    Args:
        policy: who is asked; a policy file; or None for the one that ships with Esper.
        offset: where to begin among kernels of one description, from 0, so that runs of other
            seeds meet other ones.

    Raises:
        InputError: for a policy that cannot be read, or without the extra that it needs, and for
            values out of range.
    """

    def __init__(self, *, policy: Advisor | Path | str | None = None, offset: int = 0) -> None:
        try:
            # Only who decides by a network needs one's framework, which is an extra.
            from esper.tamiyo.policy import ALPHAS, Kind, load_policy
        except ModuleNotFoundError as error:
            raise InputError(
                f"the learned controller needs {error.name}, which is not installed; install"
                " 'esper-morphogenetic[all]'"
            ) from error
        if policy is None or isinstance(policy, Path | str):
            policy = load_policy(None if policy is None else Path(policy))
        self._policy: Advisor = policy
        self._kind, self._alphas = Kind, ALPHAS
        self._recorder = ReadingsRecorder(offset=offset)
        self._remarks: list[str] = []

    def decide(self, observation: Observation) -> list[Decision]:
        """Resets, then what the policy chooses.

        Raises:
            InputError: for an observation without a topology.
        """
        readings = self._recorder.read(observation)
        graph = model_graph(readings, self._recorder.edges(observation), np)
        advice = self._policy.decide(graph)
        self._remarks = [f"waits: {advice.remark}"] if advice.remark else []
        first = resets(observation)
        chosen = self._decision(observation, graph, advice)
        return first if chosen is None else [*first, chosen]

    def _decision(
        self, observation: Observation, graph: ModelGraph, advice: Advice
    ) -> Decision | None:
        kind, layer, seed, kernel, alpha = (int(own) for own in advice.choice)
        if kind == self._kind.WAIT:
            return None
        given: dict[str, Any] = {
            "confidence": min(max(advice.confidence, 0.0), 1.0),
            "uncertainty": advice.epistemic,
            "effect": Worth(*advice.effect),
            "features": tuple((name, float(part)) for name, part in advice.reasons),
        }
        if kind == self._kind.GRAFT:
            seed = int(graph.legal.free[layer])
            given["kernel_id"] = self._recorder.kernel(observation, kernel, layer).kernel_id
        elif kind == self._kind.RETARGET:
            given["alpha"] = float(self._alphas[alpha])
        action = Action(self._kind(kind).name.lower())
        return Decision(action, layer, seed, _reason(advice), **given)

    def remarks(self) -> Sequence[str]:
        """See `Remarking`: why it waits, where it cannot judge."""
        return tuple(self._remarks)

    def told(
        self, observation: Observation, applied: Sequence[Decision], vetoed: Sequence[Veto]
    ) -> None:
        """See `Controller.told`."""
        self._recorder.told(applied)

    def state(self) -> dict[str, Any]:
        """See `Controller.state`."""
        return {"recorder": self._recorder.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller.restore`."""
        self._recorder.restore(state["recorder"])


def _reason(advice: Advice) -> str:
    value, low, high = advice.effect
    named = _named(advice.reasons)
    return f"the policy expects {value:+.3g} of reward by it ({low:+.3g} to {high:+.3g}){named}"


def _named(reasons: Sequence[tuple[str, float]]) -> str:
    named = ", ".join(f"{name} {part:+.2g}" for name, part in reasons[:_NAMED])
    return f"; most by {named}" if named else ""

"""Who is asked what to do with models, all of them at once."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from esper.errors import InputError
from esper.tamiyo._controller import Action, Decision, Observation
from esper.tamiyo.service._report import Report, observation_of, seeds_now
from esper_functional import SeedState


@dataclasses.dataclass(frozen=True)
class News:
    """What is new of one model."""

    model: str
    reports: tuple[Report, ...]
    """Its last reports, the newest first; one at least, all of one shape."""
    health: np.ndarray
    """`HEALTH` `[rows]`: of each seed that was heard of since it was last advised upon, one."""
    fresh: bool = True
    """Whether the newest report was not advised upon before; if it was, health came that must
    pass."""

    @property
    def report(self) -> Report:
        """The newest."""
        return self.reports[0]

    @functools.cached_property
    def seeds(self) -> SeedState:
        """Stages, alphas, health and consecutive errors as far as they are known."""
        return seeds_now(self.report, self.health)

    @functools.cached_property
    def observation(self) -> Observation:
        """The newest report as controllers within a run see it, with the seeds as they are now."""
        return observation_of(self.report, self.seeds)


class Advisor(Protocol):
    """Decides about models that it holds nothing of: what it says depends on the news alone."""

    def advise(self, news: Sequence[News]) -> Sequence[Sequence[Decision] | None]:
        """What to do with each model, in order of preference.

        Returns:
            As many as there are news, in their order; None for a model about which it cannot say
            anything yet, and is to be asked again.
        """
        ...


def check_decision(decision: Any) -> None:
    """Refuse what is no decision, so that an advisor's mistake goes no further than its model.

    Raises:
        InputError: for another type, or a field of another one.
    """
    if not isinstance(decision, Decision):
        raise InputError(
            f"an advisor asks for what is a Decision; it asked for a {type(decision).__name__}"
        )
    for name, kind, wanted in (
        ("action", Action, "an Action"),
        ("layer", int | np.integer, "a whole number"),
        ("seed", int | np.integer, "a whole number"),
        ("reason", str, "a text"),
        ("kernel_id", str, "a text"),
        ("alpha", float | int | np.number, "a number"),
        ("confidence", float | int | np.number, "a number"),
        ("uncertainty", float | int | np.number | None, "a number, or None"),
    ):
        value: Any = getattr(decision, name)
        if not isinstance(value, kind):
            raise InputError(
                f"{name} of a decision is {wanted}; an advisor gave {value!r:.80}, a"
                f" {type(value).__name__}"
            )

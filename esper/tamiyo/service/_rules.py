"""An advisor by thresholds, which has learned nothing and needs no file."""

from collections.abc import Sequence

import numpy as np

from esper.tamiyo._check import require
from esper.tamiyo._controller import Action, Decision
from esper.tamiyo._places import resets
from esper.tamiyo.service._advisor import News
from esper_functional import SeedLifecycleState


class RuleAdvisor:
    """Asks for kernels to be taken out that fail or are ill, and for failed seeds to be emptied.

    - UNLOAD of an ACTIVE seed that failed `errors` times in a row, as its health told since it
      was last advised upon;
    - UNLOAD of an ACTIVE seed whose health was below `least_health` in each of the last `reports`
      reports;
    - RESET of a seed in ERROR_RECOVERY.

    It grafts nothing, since thresholds on health do not say what would help.

    Args:
        errors: consecutive failures, from 1.
        least_health: in [0, 1].
        reports: from 1 to as many as the news have; of fewer nothing is said.

    Raises:
        InputError: for values out of range.
    """

    def __init__(self, *, errors: int = 3, least_health: float = 0.2, reports: int = 3) -> None:
        require("errors of a rule advisor", errors, 1, whole=True)
        require("least_health of a rule advisor", least_health, 0, 1)
        require("reports of a rule advisor", reports, 1, whole=True)
        self._errors = errors
        self._least_health = least_health
        self._reports = reports

    def advise(self, news: Sequence[News]) -> list[list[Decision]]:
        """See `Advisor.advise`."""
        return [self._about(own) for own in news]

    def _about(self, news: News) -> list[Decision]:
        stage = np.asarray(news.seeds.stage)
        active = stage == int(SeedLifecycleState.ACTIVE)
        failures = np.zeros(stage.shape, np.int64)
        failures[news.health["layer"], news.health["seed"]] = news.health["most_errors"]
        failing = active & (failures >= self._errors)
        ill = self._ill(news) & active & ~failing
        decisions = resets(news.observation) + [
            Decision(
                Action.UNLOAD, layer, seed,
                f"it failed {failures[layer, seed]} times in a row, and"
                f" {self._errors} are too many",
            )
            for layer, seed in _places(failing)
        ]  # fmt: skip
        last = news.report.health
        return decisions + [
            Decision(
                Action.UNLOAD, layer, seed,
                f"its health is {last[layer, seed]:.3g}, and was below {self._least_health:g} in"
                f" the last {self._reports} reports",
            )
            for layer, seed in _places(ill)
        ]  # fmt: skip

    def _ill(self, news: News) -> np.ndarray:
        past = news.reports[: self._reports]
        ill = np.full(news.report.shape, len(past) == self._reports)
        for report in past:
            # A comparison with NaN is false: what was not measured is not ill.
            ill &= report.health < self._least_health
            ill &= report.stage == int(SeedLifecycleState.ACTIVE)
        return ill


def _places(chosen: np.ndarray) -> list[tuple[int, int]]:
    rows, seeds = np.nonzero(chosen)
    return list(zip(rows.tolist(), seeds.tolist(), strict=True))

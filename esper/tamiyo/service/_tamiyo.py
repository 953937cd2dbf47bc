"""Tamiyo itself: health and reports go in, decisions come out.

It is a plain object, which has no threads, no clock and no bus: its caller says what time it is. A
run in one process calls it directly; the service is a loop around it.
"""

import dataclasses
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from esper.contracts import HealthSignal, HealthSignalBatch, ModelReport
from esper.errors import InputError
from esper.tamiyo._check import require
from esper.tamiyo._controller import Decision, Veto
from esper.tamiyo._guard import Guard
from esper.tamiyo._places import Place
from esper.tamiyo._safety import Safety
from esper.tamiyo.service._advisor import Advisor, News, check_decision
from esper.tamiyo.service._collector import HealthCollector
from esper.tamiyo.service._counts import Counts
from esper.tamiyo.service._experience import (
    Experience,
    Learner,
    changed_places,
    is_seen,
    measured_reward,
    was_done,
)
from esper.tamiyo.service._report import Report

_GUARDS = 4
"""Guards of forgotten models that are remembered, over the models that are looked after."""

_log = logging.getLogger("esper.tamiyo.service")


@dataclasses.dataclass(frozen=True)
class Advice:
    """What is to be done with one model."""

    model: str
    step: int
    """The boundary of the report that it is about."""
    decisions: tuple[Decision, ...]
    vetoes: tuple[Veto, ...]
    shadow: bool
    """To be looked at, and acted upon by nobody."""
    trace_id: str
    """Of the report that it is about, where it was given one."""
    answers: bool = True
    """Whether it is the first that is said of that report."""


class _Model:
    """What is remembered of a model."""

    def __init__(self, safety: Safety, reports: int) -> None:
        self.guard = Guard(safety)
        self.reports: deque[Report] = deque(maxlen=reports)
        self.trace_id = ""
        self.fresh = False
        """Whether its newest report was not advised upon yet."""
        self.asked: dict[Place, Decision] = {}
        """What was asked for since its newest report, by place."""
        self.late: tuple[Decision, ...] = ()
        """What was asked for before that, and was not done when it reported."""


class Tamiyo:
    """Decides for many models at once.

    A model begins with its first report; what was heard of its health before that waits for it.
    At each `decide` all models of which there is a new report, or health that must pass, go to the
    advisor in one call. What it asks for passes each model's own guard. A place that something was
    asked for is left alone until the model reports again: nobody has had the time to do it.

    Args:
        advisor: says what to do.
        safety: the rules that each decision must pass, for each model by itself.
        collector: where health waits; by default one with its own defaults.
        shadow: advice is marked as such, and is to be acted upon by nobody.
        learn: whether what came of decisions is handed to `learner`.
        learner: who learns from it.
        price: of parameters, in the reward that is learned from; see `measured_reward`.
        reports: of each model that the advisor is shown, from 1.
        most_models: that are looked after at once, from 1.
        most_experiences: that wait for the learner; the oldest go.
        forget_seconds: after which a model of which nothing was heard is forgotten, but for what
            its guard remembers; longer than a run takes from one boundary to the next.

    Raises:
        InputError: for values out of range, learning without a learner, or in shadow.
    """

    def __init__(
        self,
        advisor: Advisor,
        *,
        safety: Safety | None = None,
        collector: HealthCollector | None = None,
        shadow: bool = False,
        learn: bool = False,
        learner: Learner | None = None,
        price: float = 0.0,
        reports: int = 4,
        most_models: int = 1_024,
        most_experiences: int = 4_096,
        forget_seconds: float = 6 * 3_600.0,
    ) -> None:
        require("reports of Tamiyo", reports, 1, whole=True)
        require("most_models of Tamiyo", most_models, 1, whole=True)
        require("most_experiences of Tamiyo", most_experiences, 1, whole=True)
        require("forget_seconds of Tamiyo", forget_seconds, 0)
        require("price of Tamiyo", price, 0)
        if learn and learner is None:
            raise InputError(
                "learning is switched on, and there is nobody who learns: give a learner, which"
                " has a method update(experiences, seconds), or switch learning off"
            )
        if learn and shadow:
            raise InputError(
                "in shadow nothing is done, so there is nothing to learn from: switch off either"
                " shadow or learning"
            )
        self._advisor = advisor
        self._safety = safety or Safety()
        self._collector = collector or HealthCollector()
        self._shadow = shadow
        self._learner = learner if learn else None
        self._price = price
        self._reports = reports
        self._most_models = most_models
        self._forget_seconds = forget_seconds
        self._models: dict[str, _Model] = {}
        self._heard: dict[str, float] = {}
        """When a model was last heard of, by the time of the decision after that."""
        self._new: set[str] = set()
        """Those heard of since the last decision."""
        self._postponed: frozenset[str] = frozenset()
        self._experiences: deque[Experience] = deque(maxlen=most_experiences)
        self._guards: dict[str, tuple[Report, dict[str, Any]]] = {}
        """What the guards of forgotten models remember; the oldest first."""
        self.counts = Counts()

    @property
    def collector(self) -> HealthCollector:
        """Where health waits."""
        return self._collector

    @property
    def models(self) -> int:
        """Models that have reported, and are not forgotten."""
        return len(self._models)

    @property
    def postponed(self) -> frozenset[str]:
        """Models about which the advisor could not say anything at the last decision, yet."""
        return self._postponed

    @property
    def shadow(self) -> bool:
        """Whether nobody is to act on what it says."""
        return self._shadow

    @property
    def learning(self) -> bool:
        """Whether somebody learns."""
        return self._learner is not None

    @property
    def learner(self) -> Learner | None:
        """Who learns."""
        return self._learner

    def collect(self, model: str, signals: HealthSignalBatch | HealthSignal) -> None:
        """Take in health of a model, in the order in which it was measured.

        Raises:
            InputError: for columns that are none, or one model more than are looked after.
        """
        self._check_room(model)
        self._collector.admit(model, signals)
        self._new.add(model)

    def report(self, model: str, report: ModelReport, *, trace_id: str = "") -> None:
        """Take in what a model reports at a boundary.

        A report of another network under the same name, one of other sites or another number of
        seeds, begins anew. One of an earlier step makes the later ones forgotten: the run went
        back.

        Raises:
            InputError: for one model more than are looked after.
        """
        self._check_room(model)
        found, own = Report(report), self._models.get(model)
        if own is not None and own.reports and not _same(own.reports[0], found):
            self.counts.replaced += 1
            own = None
        if own is None:
            own = self._models[model] = _Model(self._safety, self._reports)
            network, guard = self._guards.pop(model, (None, None))
            if network is not None and guard is not None and _same(network, found):
                own.guard.restore(guard)
        if own.fresh:
            own.late = ()
        elif self._learner is not None and own.reports:
            self._learn_from(model, own, found)
        while own.reports and own.reports[0].data.step >= report.step:
            own.reports.popleft()
        own.reports.appendleft(found)
        own.trace_id, own.fresh, own.asked = trace_id, True, {}
        self._new.add(model)
        self.counts.reports += 1

    def decide(self, now: float) -> list[Advice]:
        """What to do with the models of which there is news.

        Args:
            now: seconds, of which only differences are read; no less than the time before.

        Returns:
            One for each model that was advised upon, also where nothing is to be done. Those about
            which the advisor could not say anything yet are asked about at the next one.
        """
        self._forget(now)
        pressing = self._collector.pressing()
        names = [
            name for name, own in self._models.items() if own.fresh or name in pressing
        ]  # fmt: skip
        self._postponed = frozenset()
        if not names:
            return []
        health = self._collector.drain(names)
        news = [self._news(name, health[name]) for name in names]
        self.counts.advised += len(news)
        found, later = list[Advice](), set[str]()
        for own, asked in zip(news, self._advice(news), strict=True):
            if asked is None:
                self._collector.give_back(own.health)
                self.counts.postponed += 1
                later.add(own.model)
            else:
                found.append(self._reviewed(own, asked))
        self._postponed = frozenset(later)
        return found

    def learn(self, seconds: float) -> None:
        """Let the learner learn for no longer than so many seconds; nothing where there is none.

        What it raises is counted and logged, and what it was given is gone.
        """
        if self._learner is None or not seconds > 0.0:
            return
        waiting = tuple(self._experiences)
        self._experiences.clear()
        try:
            self._learner.update(waiting, seconds)
        except Exception as error:
            self.counts.failed("learner", error)
            _log.warning("the learner failed: %s", error, exc_info=error)

    def _news(self, name: str, health: np.ndarray) -> News:
        model = self._models[name]
        sites, seeds = model.reports[0].shape
        there = (health["layer"] < sites) & (health["seed"] < seeds)
        self.counts.strange += int(health["signals"][~there].sum())
        return News(name, tuple(model.reports), health[there], model.fresh)

    def _advice(self, news: Sequence[News]) -> Sequence[Sequence[Decision] | None]:
        """What the advisor says; where it fails, of each model by itself."""
        try:
            return self._asked(news)
        except Exception as error:
            self.counts.failed("advisor", error)
            _log.warning("the advisor failed: %s", error, exc_info=error)
            if len(news) == 1:
                return [()]
        # One of the models may be the cause, and is not to keep the others from advice.
        return [own for each in news for own in self._advice([each])]

    def _asked(self, news: Sequence[News]) -> Sequence[Sequence[Decision] | None]:
        found = [None if own is None else tuple(own) for own in self._advisor.advise(news)]
        if len(found) != len(news):
            raise InputError(
                f"an advisor answers for each model: it was asked about {len(news)} and answered"
                f" for {len(found)}"
            )
        for own in found:
            for decision in own or ():
                check_decision(decision)
        return found

    def _reviewed(self, news: News, asked: Sequence[Decision]) -> Advice:
        model, counts = self._models[news.model], self.counts
        sites, seeds = news.report.shape
        wanted: list[Decision] = []
        for decision in asked:
            place = decision.layer, decision.seed
            if not (0 <= place[0] < sites and 0 <= place[1] < seeds):
                counts.stray += 1
            elif place in model.asked:
                counts.repeated += 1
            else:
                wanted.append(decision)
        allowed, vetoes = list[Decision](), list[Veto]()
        # The guard sees each boundary, also where nothing is asked for.
        answers = model.fresh
        if wanted or answers:
            allowed, vetoes = model.guard.review(news.observation, wanted)
        for decision in allowed:
            model.asked[decision.layer, decision.seed] = decision
            counts.decided(decision.action.value)
        for veto in vetoes:
            counts.vetoed(veto.rule)
        model.fresh = False
        return Advice(
            news.model,
            news.report.data.step,
            tuple(allowed),
            tuple(vetoes),
            self._shadow,
            model.trace_id,
            answers,
        )

    def _learn_from(self, name: str, model: _Model, after: Report) -> None:
        before, asked = model.reports[0], tuple(model.asked.values())
        late, model.late = model.late, ()
        if after.data.step <= before.data.step:
            return
        # A run that does not wait for answers does what was asked for a boundary later.
        model.late = tuple(own for own in asked if not was_done(own, after))
        decisions = (
            *(own for own in late if is_seen(own, before, after)),
            *(own for own in asked if own not in model.late),
        )
        if not decisions and model.late:
            self.counts.not_done += 1
            return
        if changed_places(before, after) - {(own.layer, own.seed) for own in decisions}:
            self.counts.unasked += 1
            return
        reward = measured_reward(before, after, price=self._price)
        if reward is None:
            self.counts.unmeasured += 1
            return
        if len(self._experiences) == self._experiences.maxlen:
            self.counts.lost_experiences += 1
        self._experiences.append(Experience(name, before, decisions, after, reward))
        self.counts.experiences += 1

    def _check_room(self, model: str) -> None:
        if model in self._heard or model in self._new:
            return
        if len(self._heard.keys() | self._new) >= self._most_models:
            raise InputError(
                f"{self._most_models} models are looked after, which is as many as may be, and"
                f" {model[:80]!r} would be one more: raise most_models, or wait until one was"
                f" silent for {self._forget_seconds:g} s"
            )

    def _forget(self, now: float) -> None:
        self._heard.update(dict.fromkeys(self._new, now))
        self._new = set()
        silent = [name for name, at in self._heard.items() if now - at > self._forget_seconds]
        for name in silent:
            del self._heard[name]
            own = self._models.pop(name, None)
            if own is not None and own.reports:
                self._guards[name] = own.reports[0], own.guard.state()
            while len(self._guards) > _GUARDS * self._most_models:
                del self._guards[next(iter(self._guards))]
            self._collector.forget(name)
            self.counts.forgotten += 1


def _same(report: Report, other: Report) -> bool:
    def network(own: ModelReport) -> tuple[Any, ...]:
        return own.sites, own.seeds, own.senders, own.receivers

    return network(report.data) == network(other.data)

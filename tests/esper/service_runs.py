"""A service for runs in tests: beside them in one process, which asks for what a test says."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from esper.oona import MemoryBroker
from esper.tamiyo import Action, Decision
from esper.tamiyo.service import News, Tamiyo, TamiyoService


class Scripted:
    """An `Advisor` that asks for what it is told to, when a report is new."""

    def __init__(self, script: Callable[[News], Sequence[Decision]]) -> None:
        self._script = script
        self.seen: list[News] = []

    def advise(self, news: Sequence[News]) -> list[Sequence[Decision]]:
        self.seen += news
        return [self._script(own) if own.fresh else () for own in news]


def first_kernel(seed: int, reason: str = "because the test says so") -> Callable[[News], Decision]:
    """A graft of the first kernel on offer, in the first layer."""

    def made(news: News) -> Decision:
        kernel = news.report.kernels[0].kernel_id
        return Decision(Action.GRAFT, 0, seed, reason, kernel, confidence=0.75)

    return made


def graft_once(news: News) -> Sequence[Decision]:
    """At the first report; never again."""
    return [first_kernel(0)(news)] if not (news.report.stage > 0).any() else []


def graft_each_time(news: News) -> Sequence[Decision]:
    """The next free seed, at every report."""
    free = [seed for seed, stage in enumerate(news.report.stage[0]) if stage == 0]
    return [first_kernel(free[0])(news)] if free else []


class Prompt(MemoryBroker):
    """A bus on which a service has answered as soon as something was said: no time passes."""

    service: TamiyoService | None = None

    def publish(self, messages) -> None:
        super().publish(messages)
        service, self.service = self.service, None
        if service is not None:
            # What the service itself publishes is no news to it.
            service.collect()
            service.decide()
            self.service = service

    def answered_by(self, tamiyo: Tamiyo) -> "Prompt":
        self.service = TamiyoService(tamiyo, self)
        # The group is there from now on.
        self.service.collect()
        return self


@contextmanager
def serving(tamiyo: Tamiyo, broker) -> Iterator[TamiyoService]:
    """A service in a thread, on any bus."""
    service = TamiyoService(tamiyo, broker, collect_seconds=0.02, decide_seconds=0.02)
    service.collect()
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join()

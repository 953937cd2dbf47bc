"""A worker: takes blueprints from a library's queue, and puts kernels into the library."""

import dataclasses
import logging
import math
import random
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from esper.contracts import MOST_RESULTS, BlueprintQuery, BlueprintState, Claim
from esper.errors import EsperError, InputError
from esper.recovery import RetryPolicy
from esper.tezzeret._jobs import CompileJob
from esper.tezzeret._pool import CompilePool
from esper.tezzeret.service._asked import job_of
from esper.tezzeret.service._bell import Bell
from esper.tezzeret.service._ending import Ending
from esper.tezzeret.service._late_bus import WorkerBus
from esper.tezzeret.service._leases import Leases
from esper.tezzeret.service._listener import Listener
from esper.tezzeret.service._outbox import Outbox
from esper.tezzeret.service._patience import POLICY, Patience, is_away
from esper.tezzeret.service._queue import BlueprintQueue
from esper.tezzeret.service._settling import Settling, about
from esper.tezzeret.service._statistics import Counts, WorkerStatistics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

IDLE = RetryPolicy(base_delay=0.2, factor=1.5, max_delay=2.0, jitter=0.5)
"""How long is waited before an empty queue is asked again."""

PER_PROCESS = 4
"""Claims at a time for each process. Kernels of one program are often submitted together, and are
made by one process; what a worker holds, no other one can do."""

_LAST_CALLS_SECONDS = 5.0
"""For giving back, when a worker ends."""

_log = logging.getLogger("esper.tezzeret.worker")


class QueueWorker:
    """Compiles what waits in a library's queue, in processes of its own.

    A claim is renewed while it is worked on, however long that takes. Whatever dies, the lease of
    what it had claimed runs out and another worker does it: kernels are made of equal bytes
    wherever they are made, so that what is done twice is there once.

    A library that is away is waited for: what was compiled is kept until it is back, or until
    `patience_seconds` are over, and then done again by somebody. A bus that is away stops nothing.

    Args:
        queue: the library.
        name: of the worker: for who looks at claims.
        pool: where it compiles; who gives it closes it. By default one of its own.
        processes: how many kernels are compiled at a time, in a pool of its own.
        bus: tells of what is submitted, and is told of what was done; without one the worker
            asks the library every few seconds.
        lease_seconds: of each claim.
        grace_seconds: how long `stop` lets what is begun go on.
        patience_seconds: how long a kernel is kept for a library that is away.
        policy: how long is waited between asking, where nothing waits or nobody answers.
        registry: where metrics go.

    Raises:
        ValueError: for fewer than one process, and the like.
    """

    def __init__(
        self,
        queue: BlueprintQueue,
        name: str,
        *,
        pool: CompilePool | None = None,
        processes: int = 1,
        bus: WorkerBus | None = None,
        lease_seconds: float = 60.0,
        grace_seconds: float = 20.0,
        patience_seconds: float = 600.0,
        policy: RetryPolicy = POLICY,
        registry: "CollectorRegistry | None" = None,
    ) -> None:
        for what, value, least in (
            ("lease_seconds", lease_seconds, 0.1),
            ("grace_seconds", grace_seconds, 0.0),
            ("patience_seconds", patience_seconds, 0.0),
        ):
            if not value >= least:
                raise ValueError(f"{what} of a worker must be at least {least}, got {value!r}")
        self.name = name
        self._queue = queue
        self._bus = bus
        self._lease_seconds = lease_seconds
        self._policy = policy
        self._pool = CompilePool(processes) if pool is None else pool
        self._own_pool = self._pool if pool is None else None
        self._most = len(self._pool) * PER_PROCESS
        self._counts = Counts(registry, self._waiting)
        self._bell = Bell()
        # Workers that wait for one library are not to come back to it at one moment.
        self._draws = random.Random(zlib.crc32(name.encode()))
        self._patience = Patience(self._library_away, policy=policy, draws=self._new_draws())
        self._leases = Leases(queue.renew, on_lost=self._claim_lost, on_away=self._library_away)
        self._outbox = Outbox(bus, on_away=self._bus_away, policy=policy, draws=self._new_draws())
        self._settling = Settling(
            queue,
            self._leases,
            self._outbox,
            self._counts,
            self._patience,
            patience_seconds,
        )
        self._ending = Ending(grace_seconds, self._end)
        self._listener: Listener | None = None
        self._claims: dict[int, Claim] = {}
        self._ask_again = 0.0
        self._missed = 0
        self._no_more = False
        """Until all that is held is done."""

    def stop(self) -> None:
        """End soon; may be called from another thread, and from the handler of a signal.

        What is begun may go on for a while, what is not is given back. Called once more, what is
        begun is given back at once.
        """
        self._ending.ask()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._ending.asked

    def statistics(self) -> WorkerStatistics:
        """What was done until now."""
        return self._counts.statistics(
            announced=self._outbox.published, unannounced=self._outbox.dropped
        )

    def run(self, *, once: bool = False) -> WorkerStatistics:
        """Work until told to stop.

        Args:
            once: end when nothing waits in the queue.

        Raises:
            AccessDeniedError: where the library refuses the worker.
            EsperError: where `once` is asked for, and the library cannot answer.
        """
        _log.info("a worker begins", extra={"worker": self.name, "most": self._most})
        try:
            if self._bus is not None:
                self._listener = Listener(
                    self._bus,
                    self._bell,
                    on_away=self._bus_away,
                    policy=self._policy,
                    draws=self._new_draws(),
                )
            self._work(once)
        finally:
            self._close()
        statistics = self.statistics()
        _log.info(
            "a worker has ended", extra={"worker": self.name, **dataclasses.asdict(statistics)}
        )
        return statistics

    def _work(self, once: bool) -> None:
        idle, away = self._idle(), self._patience.delays()
        while not self.stopping:
            self._bell.heard()
            try:
                claims = self._claim(self._most)
            except EsperError as error:
                if once or not is_away(error):
                    raise
                self._bell.wait(next(away))
                continue
            away = self._patience.delays()
            if claims:
                idle = self._idle()
                for outcome in self._pool.compile(self._jobs(claims), more=self._more):
                    self._settling.settle(self._claims.pop(id(outcome.job)), outcome)
                    self._counts.hold(len(self._claims))
            elif once:
                return
            elif not self.stopping:
                self._bell.wait(next(idle))

    def _more(self, free: int) -> Iterable[CompileJob]:
        """Further jobs while processes have nothing to do, where there are some."""
        now = time.monotonic()
        most = min(free * PER_PROCESS, self._most - len(self._claims))
        if self.stopping or self._no_more or most < 1:
            return ()
        if not (self._bell.heard() or now >= self._ask_again):
            return ()
        try:
            claims = self._claim(most)
        except EsperError as error:
            if not is_away(error):
                raise
            claims = []
        if not claims:
            self._ask_again = now + IDLE.max_delay * (0.5 + self._draws.random())
        return self._jobs(claims)

    def _claim(self, most: int) -> list[Claim]:
        """Blueprints to compile, of which one that has been tried before comes alone.

        It may be what killed those that tried it, and would use up attempts of others.
        """
        try:
            claims = self._queue.claim(self.name, most=most, lease_seconds=self._lease_seconds)
        except EsperError as error:
            if is_away(error):
                self._missed += 1
                self._library_away("claiming", error, self._missed)
            raise
        self._missed = 0
        self._leases.hold(claims)
        self._counts.add("claimed", len(claims))
        tried = [claim for claim in claims if claim.attempt > 1]
        self._no_more = bool(tried)
        if not tried:
            return claims
        kept = tried[:1] if not self._claims else [c for c in claims if c.attempt == 1]
        for claim in claims:
            if claim not in kept:
                self._settling.give_back(claim)
        return kept

    def _jobs(self, claims: list[Claim]) -> list[CompileJob]:
        """What is to be compiled; what is no blueprint is failed at once."""
        jobs: list[CompileJob] = []
        for claim in claims:
            try:
                job = job_of(claim.blueprint)
            except InputError as error:
                self._settling.fail(claim, str(error))
                continue
            self._claims[id(job)] = claim
            jobs.append(job)
        self._counts.hold(len(self._claims))
        return jobs

    def _end(self, at_once: bool) -> None:
        """In the thread of the ending."""
        _log.info("a worker is to end", extra={"worker": self.name, "at_once": at_once})
        self._pool.cancel(begun=at_once)
        # The library may be away; some time is left for giving back.
        self._patience.end_by(self._ending.moment + _LAST_CALLS_SECONDS)
        self._bell.ring()

    def _close(self) -> None:
        self._pool.cancel()
        if self._own_pool is not None:
            self._own_pool.close()
        self._patience.end_by(time.monotonic() + _LAST_CALLS_SECONDS)
        for claim in self._leases.all():
            try:
                self._settling.give_back(claim)
            except EsperError as error:
                _log.warning("a claim is left to its lease: %s", error, extra=about(claim))
        self._claims.clear()
        self._counts.hold(0)
        self._leases.close()
        if self._listener is not None:
            self._listener.close()
        self._outbox.close()
        self._ending.close()

    def _waiting(self) -> float:
        query = BlueprintQuery(states=(BlueprintState.UNVALIDATED,), limit=MOST_RESULTS)
        count = 0
        try:
            # A page holds fewer where they are large.
            while True:
                page = self._queue.blueprints(query)
                count += len(page.items)
                if page.next_cursor is None or count >= MOST_RESULTS:
                    return min(count, MOST_RESULTS)
                query = query.model_copy(update={"cursor": page.next_cursor})
        except EsperError:
            return math.nan

    def _idle(self) -> Iterator[float]:
        return IDLE.delays(self._draws)

    def _new_draws(self) -> random.Random:
        """Of another thread."""
        return random.Random(self._draws.random())

    def _claim_lost(self, claim: Claim, error: Exception) -> None:
        _log.info("a claim was lost: %s", error, extra=about(claim))

    def _library_away(self, what: str, error: Exception, missed: int) -> None:
        self._counts.add("library_away")
        _away("library", self.name, what, error, missed)

    def _bus_away(self, what: str, error: Exception, missed: int) -> None:
        self._counts.add("bus_away")
        _away("bus", self.name, what, error, missed)


def _away(service: str, worker: str, what: str, error: Exception, missed: int) -> None:
    # One line for each time that it goes away, and the rest for who looks closely.
    level = logging.WARNING if missed == 1 else logging.DEBUG
    _log.log(
        level,
        "the %s does not answer while %s, which is tried again: %s",
        service,
        what,
        error,
        extra={"worker": worker, "missed": missed, "error_type": type(error).__name__},
    )

"""What a worker has done, counted."""

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from esper.contracts import MOST_RESULTS

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


@dataclasses.dataclass(frozen=True)
class WorkerStatistics:
    """Counts since a worker began, and how it stands."""

    claimed: int = 0
    """Claims of blueprints."""
    compiled: int = 0
    """Blueprints that became kernels."""
    failed: int = 0
    """Blueprints that are invalid now."""
    retried: int = 0
    """Blueprints put back to be tried again, because what failed may not have been theirs."""
    given_back: int = 0
    """Blueprints put back because the worker ended."""
    left: int = 0
    """Blueprints whose leases were left to run out, because the library did not answer."""
    lost: int = 0
    """Blueprints that another worker has by now, or that were taken away."""
    seconds: float = 0.0
    """Of compiling, over all processes."""
    held: int = 0
    """Claims now."""
    library_away: int = 0
    """Calls of the library that had no answer."""
    bus_away: int = 0
    """Calls of the bus that had no answer."""
    announced: int = 0
    """Messages that the bus has taken."""
    unannounced: int = 0
    """Messages that were lost."""


class Counts:
    """Counts in this process, and in a registry of Prometheus where there is one.

    The metrics are `esper_worker_blueprints_total{outcome}`, `esper_worker_compile_seconds`,
    `esper_worker_held`, `esper_worker_waiting`, `esper_worker_away_total{what}`.

    Args:
        waiting: how many blueprints wait in the library; called when the metrics are read.
    """

    def __init__(self, registry: "CollectorRegistry | None", waiting: Callable[[], float]) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}
        self._metrics = None if registry is None else _Metrics(registry, waiting)

    def add(self, name: str, amount: float = 1) -> None:
        """Count something; the names are the fields of `WorkerStatistics`."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount
        if self._metrics is not None:
            self._metrics.add(name, amount)

    def compiled_in(self, seconds: float) -> None:
        """A process has compiled for so long."""
        with self._lock:
            self._counts["seconds"] = self._counts.get("seconds", 0.0) + seconds
        if self._metrics is not None:
            self._metrics.seconds.observe(seconds)

    def hold(self, claims: int) -> None:
        """So many claims are held now."""
        with self._lock:
            self._counts["held"] = claims
        if self._metrics is not None:
            self._metrics.held.set(claims)

    def statistics(self, *, announced: int = 0, unannounced: int = 0) -> WorkerStatistics:
        """All of them now."""
        with self._lock:
            counts = dict(self._counts)
        seconds = counts.pop("seconds", 0.0)
        return WorkerStatistics(
            **{name: int(count) for name, count in counts.items()},
            seconds=seconds,
            announced=announced,
            unannounced=unannounced,
        )


class _Metrics:
    def __init__(self, registry: "CollectorRegistry", waiting: Callable[[], float]) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self.blueprints = Counter(
            "esper_worker_blueprints",
            "Blueprints by what became of them",
            ["outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "esper_worker_compile_seconds",
            "Wall time of compiling one blueprint",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100),
            registry=registry,
        )
        self.held = Gauge("esper_worker_held", "Claims held now", registry=registry)
        Gauge(
            "esper_worker_waiting",
            f"Blueprints that wait in the library, {MOST_RESULTS} for more; NaN: no answer",
            registry=registry,
        ).set_function(waiting)
        self.away = Counter(
            "esper_worker_away", "Calls that had no answer", ["what"], registry=registry
        )

    def add(self, name: str, amount: float) -> None:
        what, away, _ = name.partition("_away")
        if away:
            self.away.labels(what).inc(amount)
        else:
            self.blueprints.labels(name).inc(amount)

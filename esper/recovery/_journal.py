"""What is told of errors and of what was done about them: events, and metrics of prometheus."""

import dataclasses
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from esper.oona import Bus, Topic
from esper.recovery._breaker import CircuitChange, CircuitState
from esper.recovery._types import ErrorContext, RecoveryStrategy

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What was done about one error."""

    error: ErrorContext
    strategy: RecoveryStrategy
    recovered: bool
    """Whether something worked."""
    action: str
    """What worked or was tried last: retry, fallback, degrade, recovery, or nothing."""
    attempts: int
    """Calls of functions that were made."""
    escalated: bool
    """Whether it asked for somebody's attention; `detail` says why, and if anybody was told."""
    detail: str
    """Why it did not work, or what went wrong on the way; may be empty."""
    at: float
    """Seconds on the manager's clock."""
    tried: bool = True
    """False where nothing was to be done here: a recovery at this place was under way already, or
    an error was only recorded, and somebody was to be told. It is neither success nor failure."""

    def payload(self) -> dict[str, Any]:
        """What an event says of it: JSON-able."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "error": self.error.payload(), "strategy": self.strategy.value}


_STATES = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}


class _Metrics:
    def __init__(self, registry: "CollectorRegistry") -> None:
        from prometheus_client import Counter, Gauge

        self.errors = Counter(
            "esper_errors", "Errors by type and component", ["type", "component"], registry=registry
        )
        self.recoveries = Counter(
            "esper_recoveries",
            "What was done about errors",
            ["type", "strategy", "outcome"],
            registry=registry,
        )
        self.retries = Counter(
            "esper_retries", "Calls made again after a failure", ["component"], registry=registry
        )
        self.escalations = Counter(
            "esper_escalations",
            "Errors that asked for somebody's attention",
            ["type"],
            registry=registry,
        )
        self.circuit = Gauge(
            "esper_circuit_state", "0 closed, 1 half-open, 2 open", ["name"], registry=registry
        )
        self.changes = Counter(
            "esper_circuit_changes",
            "Changes of circuit breakers",
            ["name", "to"],
            registry=registry,
        )
        self.health = Gauge("esper_health_score", "From 0 to 1", registry=registry)


_SHARED: "WeakKeyDictionary[CollectorRegistry, _Metrics]" = WeakKeyDictionary()
_SHARED_LOCK = threading.Lock()


def _metrics_of(registry: "CollectorRegistry") -> _Metrics:
    # A registry refuses a second metric of one name, and may serve several managers.
    with _SHARED_LOCK:
        if registry not in _SHARED:
            _SHARED[registry] = _Metrics(registry)
        return _SHARED[registry]


class Journal:
    """Publishes events on a bus and counts in a registry, where there are any."""

    def __init__(self, bus: Bus | None = None, registry: "CollectorRegistry | None" = None) -> None:
        self._bus = bus
        self._metrics = None if registry is None else _metrics_of(registry)

    def error(self, context: ErrorContext) -> None:
        """An error was recorded."""
        self._publish(Topic.ERROR, context.payload())
        if self._metrics is not None:
            self._metrics.errors.labels(context.error_type.value, context.component).inc()

    def recovery(self, recovery: Recovery) -> None:
        """Something was done about an error."""
        self._publish(Topic.RECOVERY, recovery.payload())
        if self._metrics is not None:
            kind = recovery.error.error_type.value
            done = "recovered" if recovery.recovered else "failed"
            outcome = done if recovery.tried else "untried"
            self._metrics.recoveries.labels(kind, recovery.strategy.value, outcome).inc()
            if recovery.escalated:
                self._metrics.escalations.labels(kind).inc()

    def retry(self, component: str) -> None:
        """A call is made again."""
        if self._metrics is not None:
            self._metrics.retries.labels(component).inc()

    def circuit(self, change: CircuitChange) -> None:
        """A breaker changed."""
        self._publish(
            Topic.CIRCUIT,
            {
                "name": change.name,
                "before": change.before.value,
                "after": change.after.value,
                "event": change.event.value,
                "number": change.number,
                "at": change.at,
            },
        )
        if self._metrics is not None:
            self._metrics.circuit.labels(change.name).set(_STATES[change.after])
            self._metrics.changes.labels(change.name, change.after.value).inc()

    def health(self, score: float, intervene: bool, reason: str) -> None:
        """Health was measured."""
        self._publish(
            Topic.HEALTH, {"score": score, "should_intervene": intervene, "reason": reason}
        )
        if self._metrics is not None:
            self._metrics.health.set(score)

    def _publish(self, topic: Topic, payload: dict[str, Any]) -> None:
        if self._bus is not None:
            self._bus.publish(topic, payload)

"""What is told of errors, of what was done about them, and of health."""

from enum import StrEnum
from typing import Literal, Self

from esper.contracts._data import Count, Data, Fraction


class ErrorType(StrEnum):
    """Kinds of errors, by what can be done about them.

    Some have a second spelling, which is the same member.
    """

    KERNEL_EXECUTION = "kernel_execution"
    """A kernel raised, or returned what it should not."""
    KERNEL_LOADING = "kernel_loading"
    """A kernel could not be read, and may be the next time."""
    KERNEL_VALIDATION = "kernel_validation"
    """A kernel is damaged, refused or does not fit, and will be the next time."""
    MEMORY_OVERFLOW = "memory_overflow"
    """Memory of the host or the device is used up."""
    DEVICE_ERROR = "device_error"
    """The device or its driver failed."""
    NETWORK_ERROR = "network_error"
    """A service cannot be reached."""
    CIRCUIT_BREAKER = "circuit_breaker"
    """A call was not made, because the breaker before it is open."""
    TIMEOUT = "timeout"
    """Something took longer than it was given."""
    UNKNOWN = "unknown"
    """Anything else."""

    KERNEL_EXECUTION_ERROR = KERNEL_EXECUTION
    KERNEL_LOAD_FAILURE = KERNEL_LOADING
    VALIDATION_ERROR = KERNEL_VALIDATION
    OUT_OF_MEMORY = MEMORY_OVERFLOW

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        # The second spellings name their members as values too: ErrorType("out_of_memory").
        member = cls.__members__.get(value.upper()) if isinstance(value, str) else None
        return member if isinstance(member, cls) else None


class RecoveryStrategy(StrEnum):
    """What is done about an error; each is as true as the functions that a caller gives."""

    RETRY = "retry"
    """Do it again, waiting longer each time."""
    FALLBACK = "fallback"
    """Do something else instead."""
    CIRCUIT_BREAKER = "circuit_breaker"
    """Count it at the component's breaker, by which its callers leave it alone for a while."""
    GRACEFUL_DEGRADATION = "graceful_degradation"
    """Do less."""
    ESCALATE = "escalate"
    """Tell somebody."""


class CircuitState(StrEnum):
    """Whether calls go through."""

    CLOSED = "closed"
    """All calls go through, and failures in a row are counted."""
    OPEN = "open"
    """No call goes through until the time is over."""
    HALF_OPEN = "half_open"
    """A few calls go through, by which it is judged."""


class CircuitEvent(StrEnum):
    """What moves a breaker from one state to another."""

    TRIP = "trip"
    """The last failure allowed in a row, or somebody's hand."""
    PROBE = "probe"
    """A call after the time is over."""
    RECOVER = "recover"
    """All probes succeeded."""
    RELAPSE = "relapse"
    """A probe failed."""
    RESET = "reset"
    """Somebody's hand."""


class ErrorOccurred(Data):
    """One error: its kind, and where it happened."""

    schema_version: Literal[1] = 1
    type: ErrorType
    component: str
    layer: str
    seed: int | None
    kernel: str | None
    at: float
    """Seconds on the clock of whoever recorded it."""
    message: str
    metadata: dict[str, str | int | float | bool | None]


class RecoveryDone(Data):
    """What was done about one error."""

    schema_version: Literal[1] = 1
    error: ErrorOccurred
    strategy: RecoveryStrategy
    recovered: bool
    action: str
    attempts: Count
    escalated: bool
    detail: str
    at: float
    tried: bool


class CircuitChanged(Data):
    """A circuit breaker went from one state to another."""

    schema_version: Literal[1] = 1
    name: str
    before: CircuitState
    after: CircuitState
    event: CircuitEvent
    number: Count
    """Of the breaker's changes, from 1."""
    at: float


class HealthMeasured(Data):
    """The health of a running system."""

    schema_version: Literal[1] = 1
    score: Fraction
    should_intervene: bool
    reason: str

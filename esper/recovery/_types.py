"""What goes wrong, what is done about it, and what is known of one error."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from esper.contracts import ErrorType as ErrorType
from esper.contracts import RecoveryStrategy as RecoveryStrategy

STRATEGIES: Mapping[ErrorType, RecoveryStrategy] = {
    ErrorType.KERNEL_EXECUTION: RecoveryStrategy.FALLBACK,
    ErrorType.KERNEL_LOADING: RecoveryStrategy.RETRY,
    ErrorType.KERNEL_VALIDATION: RecoveryStrategy.GRACEFUL_DEGRADATION,
    ErrorType.MEMORY_OVERFLOW: RecoveryStrategy.CIRCUIT_BREAKER,
    ErrorType.DEVICE_ERROR: RecoveryStrategy.ESCALATE,
    ErrorType.NETWORK_ERROR: RecoveryStrategy.RETRY,
    ErrorType.CIRCUIT_BREAKER: RecoveryStrategy.FALLBACK,
    ErrorType.TIMEOUT: RecoveryStrategy.RETRY,
    ErrorType.UNKNOWN: RecoveryStrategy.FALLBACK,
}
"""What is done where nobody has said otherwise."""


def strategies_with(own: Mapping[ErrorType, RecoveryStrategy]) -> dict[ErrorType, RecoveryStrategy]:
    """`STRATEGIES` but for those given, by both spellings of a type, or its value.

    Raises:
        InputError: for an unknown type or strategy.
    """
    try:
        return {**STRATEGIES, **{ErrorType(k): RecoveryStrategy(s) for k, s in own.items()}}
    except ValueError as error:
        from esper.errors import InputError

        raise InputError(
            f"strategies of an error recovery manager: {error}: expected a type of"
            f" {', '.join(ErrorType)}, and for it one of {', '.join(RecoveryStrategy)}"
        ) from error


def described(error: BaseException) -> str:
    """An error in one line of bounded length."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}"[:500] if first else type(error).__name__


@dataclasses.dataclass(frozen=True)
class ErrorContext:
    """One error: its kind, and where it happened."""

    error_type: ErrorType
    component: str
    """The part of the program, such as `kernel_cache`; a label of metrics, so one of few."""
    layer_name: str = ""
    seed_idx: int | None = None
    kernel_id: str | None = None
    timestamp: float | None = None
    """Seconds on the clock of whoever records it, who sets it where it is None."""
    exception: Exception | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""
    """The exception in one line, where there is one."""

    def __post_init__(self) -> None:
        # Both spellings of a type, and its value, mean the type.
        object.__setattr__(self, "error_type", ErrorType(self.error_type))
        if self.exception is not None and not self.message:
            object.__setattr__(self, "message", described(self.exception))

    @property
    def place(self) -> tuple[str, str, int | None]:
        """Where: component, layer and seed."""
        return self.component, self.layer_name, self.seed_idx

    def to_keep(self, timestamp: float) -> "ErrorContext":
        """This error for a history: at that time, and without what holds on to memory.

        A traceback holds every local variable of its frames, and so a model's activations.
        """
        plain = {
            key: value if isinstance(value, str | int | float | None) else type(value).__name__
            for key, value in self.metadata.items()
        }
        return dataclasses.replace(self, timestamp=timestamp, exception=None, metadata=plain)

    def payload(self) -> dict[str, Any]:
        """What an event says of it: JSON-able."""
        kept = self.to_keep(0.0 if self.timestamp is None else self.timestamp)
        return {
            "type": kept.error_type.value,
            "component": kept.component,
            "layer": kept.layer_name,
            "seed": kept.seed_idx,
            "kernel": kept.kernel_id,
            "at": kept.timestamp,
            "message": kept.message,
            "metadata": dict(kept.metadata),
        }

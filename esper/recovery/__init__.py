"""Recovery: errors told apart, handled by what they are, and counted.

Importing this needs neither torch nor jax.
"""

from esper.recovery._breaker import (
    MOVES,
    CircuitBreaker,
    CircuitChange,
    CircuitEvent,
    CircuitState,
)
from esper.recovery._classify import Classifier, Rule, create_error_context
from esper.recovery._guard import Guard
from esper.recovery._health import HealthMonitor, Verdict
from esper.recovery._journal import Recovery
from esper.recovery._manager import ErrorRecoveryManager
from esper.recovery._retry import RetryPolicy
from esper.recovery._tracker import ErrorTracker
from esper.recovery._types import (
    STRATEGIES,
    ErrorContext,
    ErrorType,
    RecoveryStrategy,
)

__all__ = [
    "MOVES",
    "STRATEGIES",
    "CircuitBreaker",
    "CircuitChange",
    "CircuitEvent",
    "CircuitState",
    "Classifier",
    "ErrorContext",
    "ErrorRecoveryManager",
    "ErrorTracker",
    "ErrorType",
    "Guard",
    "HealthMonitor",
    "Recovery",
    "RecoveryStrategy",
    "RetryPolicy",
    "Rule",
    "Verdict",
    "create_error_context",
]

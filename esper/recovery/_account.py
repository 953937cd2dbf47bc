"""What was done about errors, remembered and counted."""

import threading
from collections import Counter, OrderedDict, deque
from typing import Any

from esper.recovery._journal import Recovery
from esper.recovery._types import ErrorContext, ErrorType

HOUR = 3600.0
"""Seconds in which a recovery is recent."""


class Account:
    """A bounded history of recoveries, and exact counts of all. Threads may share one."""

    def __init__(self, max_history: int) -> None:
        self._lock = threading.Lock()
        self._max_history = max_history
        self._recoveries: deque[Recovery] = deque(maxlen=max_history)
        self._counts: Counter[str] = Counter()
        self._by_type: dict[ErrorType, Counter[str]] = {}
        self._unsuccessful: OrderedDict[tuple[str, str, ErrorType], int] = OrderedDict()

    def record(self, recovery: Recovery) -> None:
        """Remember what was done."""
        with self._lock:
            self._recoveries.append(recovery)
            self._counts["escalations"] += recovery.escalated
            if not recovery.tried:
                self._counts["untried"] += 1
                return
            by_type = self._by_type.setdefault(recovery.error.error_type, Counter())
            self._counts["total"] += 1
            by_type["attempted"] += 1
            self._counts["recovered"] += recovery.recovered
            by_type["recovered"] += recovery.recovered
            key = _key(recovery.error)
            before = self._unsuccessful.pop(key, 0)
            # Somebody has been told: the next ones are counted anew.
            if not recovery.recovered and not recovery.escalated:
                self._unsuccessful[key] = before + 1
            while len(self._unsuccessful) > self._max_history:
                self._unsuccessful.popitem(last=False)

    def count_retry(self) -> None:
        """A call is made again."""
        with self._lock:
            self._counts["retries"] += 1

    def unsuccessful_in_a_row(self, context: ErrorContext) -> int:
        """Recoveries of errors of this type at this place that did not work, the last ones."""
        with self._lock:
            return self._unsuccessful.get(_key(context), 0)

    @property
    def recoveries(self) -> list[Recovery]:
        """What is remembered, oldest first."""
        with self._lock:
            return list(self._recoveries)

    def stats(self, now: float) -> dict[str, Any]:
        """Counts, JSON-able."""
        with self._lock:
            total = self._counts["total"]
            return {
                "total_recoveries": total,
                "recent_recoveries": sum(r.tried and now - r.at < HOUR for r in self._recoveries),
                "recovery_success_rate": self._counts["recovered"] / total if total else None,
                "untried_recoveries": self._counts["untried"],
                "retries": self._counts["retries"],
                "escalations": self._counts["escalations"],
                "by_type": {kind.value: dict(n) for kind, n in sorted(self._by_type.items())},
            }


def _key(context: ErrorContext) -> tuple[str, str, ErrorType]:
    return context.component, context.layer_name, context.error_type

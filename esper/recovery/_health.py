"""Health of a running system: errors, latency and memory, as one score and as reasons to act."""

import math
import threading
from collections import deque
from typing import Any, NamedTuple

from esper.recovery._attempts import Action
from esper.recovery._check import require
from esper.recovery._manager import ErrorRecoveryManager
from esper.recovery._types import ErrorContext, ErrorType

CRITICAL = 0.3
"""Below this score somebody has to step in."""

_BASELINE = 20
"""Latencies that a relative threshold is taken from."""


class Verdict(NamedTuple):
    """Whether to step in, and why; `tuple(verdict)` is the pair of both."""

    should_intervene: bool
    reason: str


class HealthMonitor:
    """Scores the last measurements from 0 to 1, and hands to a manager what is out of bounds.

    The score is 0.5·e + 0.3·l + 0.2·m, each of them 1 less the mean over the window of: the error
    rate; the latency as a share of its threshold; the memory as a share of its threshold; and 0
    where that is negative. Without measurements it is 1.

    Args:
        window_size: measurements that count.
        recovery: who is told by `check_system_health`, and whose journal tells of it.
        error_threshold: highest share of calls that may fail.
        latency_threshold_ms: highest latency, in milliseconds.
        latency_factor: where given, the highest latency is that many times the median of the
            first 20 measurements, whatever the machine; until then it is `latency_threshold_ms`.
        memory_threshold_percent: highest share of memory in use, from 0 to 100.
        weights: of errors, latency and memory; they add up to 1.

    Raises:
        InputError: for a window that is no whole number from 1, thresholds or a factor that are
            not above 0, or weights that are not three or do not add up to 1.
    """

    def __init__(
        self,
        window_size: int = 100,
        *,
        recovery: ErrorRecoveryManager | None = None,
        error_threshold: float = 0.1,
        latency_threshold_ms: float = 10.0,
        latency_factor: float | None = None,
        memory_threshold_percent: float = 90.0,
        weights: tuple[float, float, float] = (0.5, 0.3, 0.2),
    ) -> None:
        of = "of a health monitor"
        require(f"window_size {of}", window_size, 1, whole=True)
        for name, threshold in (
            ("error_threshold", error_threshold),
            ("latency_threshold_ms", latency_threshold_ms),
            ("memory_threshold_percent", memory_threshold_percent),
        ):
            require(f"{name} {of}", threshold, 0, math.inf, above=True)
        if latency_factor is not None:
            require(f"latency_factor {of}", latency_factor, 0, above=True)
        if len(weights) != 3 or min(weights) < 0 or not math.isclose(sum(weights), 1.0):
            raise _refusal(f"three weights from 0 that add up to 1, got {weights}")
        self.window_size = window_size
        self.error_threshold = error_threshold
        self.memory_threshold_percent = memory_threshold_percent
        self._latency_threshold_ms = latency_threshold_ms
        self._latency_factor = latency_factor
        self._recovery = recovery
        self._weights = weights
        self._lock = threading.Lock()
        self._first_latencies: list[float] = []
        self.error_rates: deque[float] = deque(maxlen=window_size)
        self.latencies: deque[float] = deque(maxlen=window_size)
        self.memory_usage: deque[float] = deque(maxlen=window_size)

    @property
    def latency_threshold_ms(self) -> float:
        """The highest latency at present, in milliseconds."""
        first = self._first_latencies
        if self._latency_factor is None or len(first) < _BASELINE:
            return self._latency_threshold_ms
        # A median of 0 would be exceeded by everything.
        return self._latency_factor * sorted(first)[_BASELINE // 2] or self._latency_threshold_ms

    def update_metrics(
        self, errors: int, total: int, latency_ms: float, memory_percent: float
    ) -> None:
        """Take a measurement.

        Args:
            errors: calls that failed, of `total`.
            latency_ms: of a call, in milliseconds.
            memory_percent: memory in use, from 0 to 100.

        Raises:
            InputError: for numbers that cannot be; nothing is taken then.
        """
        finite = math.isfinite(latency_ms) and latency_ms >= 0
        if not (0 <= errors <= total and finite and 0 <= memory_percent <= 100):
            raise _refusal(
                "errors from 0 to total, a finite latency from 0 and memory from 0 to 100 percent,"
                f" got {errors} of {total}, {latency_ms} ms and {memory_percent} %"
            )
        with self._lock:
            self.error_rates.append(errors / max(total, 1))
            self.latencies.append(latency_ms)
            self.memory_usage.append(memory_percent)
            if len(self._first_latencies) < _BASELINE:
                self._first_latencies.append(latency_ms)

    def compute_health_score(self) -> float:
        """From 0, the worst, to 1."""
        with self._lock:
            return self._score()

    def should_intervene(self) -> Verdict:
        """Whether somebody has to step in, and why.

        It is so where the score is critical, or the last measurement is above a threshold.
        """
        with self._lock:
            score = self._score()
            if not self.error_rates:
                return Verdict(False, "nothing was measured yet")
            errors, latency, memory = (
                self.error_rates[-1], self.latencies[-1], self.memory_usage[-1]
            )  # fmt: skip
            slowest = self.latency_threshold_ms
        if score < CRITICAL:
            return Verdict(True, f"critical health score: {score:.2f}")
        if errors > self.error_threshold:
            return Verdict(True, f"high error rate: {errors:.2%}")
        if latency > slowest:
            return Verdict(True, f"high latency: {latency:.1f} ms, above {slowest:.1f} ms")
        if memory > self.memory_threshold_percent:
            return Verdict(True, f"high memory usage: {memory:.1f} %")
        return Verdict(False, "healthy")

    async def check_system_health(self, fallback_action: Action | None = None) -> Verdict:
        """Look whether to step in, and if so hand an error of the whole system to the manager.

        Args:
            fallback_action: what the manager may do about it.
        """
        verdict, context = self._look()
        if context is not None and self._recovery is not None:
            await self._recovery.handle_error(context, fallback_action)
        return verdict

    def check_system_health_sync(self, fallback_action: Action | None = None) -> Verdict:
        """`check_system_health` without an event loop."""
        verdict, context = self._look()
        if context is not None and self._recovery is not None:
            self._recovery.handle_error_sync(context, fallback_action)
        return verdict

    def stats(self) -> dict[str, Any]:
        """The score and what it is made of, JSON-able."""
        verdict = self.should_intervene()
        with self._lock:
            return {
                "health_score": self._score(),
                "should_intervene": verdict.should_intervene,
                "reason": verdict.reason,
                "measurements": len(self.error_rates),
                "error_rate": _mean(self.error_rates),
                "latency_ms": _mean(self.latencies),
                "memory_percent": _mean(self.memory_usage),
                "latency_threshold_ms": self.latency_threshold_ms,
            }

    def _look(self) -> tuple[Verdict, ErrorContext | None]:
        verdict, score = self.should_intervene(), self.compute_health_score()
        if self._recovery is not None:
            self._recovery.journal.health(score, *verdict)
        if not verdict.should_intervene:
            return verdict, None
        memory = verdict.reason.startswith("high memory")
        kind = ErrorType.MEMORY_OVERFLOW if memory else ErrorType.UNKNOWN
        context = ErrorContext(
            kind, "system", "global", metadata={"health_score": score}, message=verdict.reason
        )
        return verdict, context

    def _score(self) -> float:
        if not self.error_rates:
            return 1.0
        shares = (
            _mean(self.error_rates),
            _mean(self.latencies) / self.latency_threshold_ms,
            _mean(self.memory_usage) / self.memory_threshold_percent,
        )
        return sum(w * max(0.0, 1.0 - s) for w, s in zip(self._weights, shares, strict=True))


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _refusal(expected: str) -> Exception:
    from esper.errors import InputError

    return InputError(f"a health monitor takes {expected}")

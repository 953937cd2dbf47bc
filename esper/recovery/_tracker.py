"""Which errors there were, how often, and of which kernels."""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from esper.recovery._check import require
from esper.recovery._types import ErrorContext, ErrorType

MAX_PER_KERNEL = 100


class ErrorTracker:
    """A bounded history of errors, and exact counts of all. Threads may share one.

    Args:
        max_history: errors that are remembered.
        max_kernels: kernels whose errors are remembered; the one that failed longest ago goes.
        max_per_kernel: errors that are remembered of one.
        clock: gives seconds, of which only differences are read.

    Raises:
        InputError: for a number to remember that is no whole number from 1.
    """

    def __init__(
        self,
        *,
        max_history: int = 1000,
        max_kernels: int = 1000,
        max_per_kernel: int = MAX_PER_KERNEL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, most in (
            ("max_history", max_history),
            ("max_kernels", max_kernels),
            ("max_per_kernel", max_per_kernel),
        ):
            require(f"{name} of an error tracker", most, 1, whole=True)
        self._clock = clock
        self._lock = threading.Lock()
        self._history: deque[ErrorContext] = deque(maxlen=max_history)
        self._kernels: OrderedDict[str, deque[float]] = OrderedDict()
        self._told: set[str] = set()
        self._max_kernels = max_kernels
        self._max_per_kernel = max_per_kernel
        self._counts: Counter[ErrorType] = Counter()

    def record_error(self, context: ErrorContext) -> ErrorContext:
        """Remember an error.

        Returns:
            What is remembered: with a timestamp, and without the exception itself.
        """
        with self._lock:
            at = self._clock() if context.timestamp is None else context.timestamp
            kept = context.to_keep(at)
            self._history.append(kept)
            self._counts[kept.error_type] += 1
            if kept.kernel_id is not None:
                times = self._kernels.setdefault(kept.kernel_id, deque(maxlen=self._max_per_kernel))
                times.append(at)
                self._kernels.move_to_end(kept.kernel_id)
                while len(self._kernels) > self._max_kernels:
                    self._told.discard(self._kernels.popitem(last=False)[0])
            return kept

    @property
    def history(self) -> list[ErrorContext]:
        """The errors that are remembered, oldest first."""
        with self._lock:
            return list(self._history)

    def is_problematic_kernel(
        self, kernel_id: str, threshold: int = 3, time_window: float | None = None
    ) -> bool:
        """Whether a kernel has failed at least `threshold` times.

        Args:
            time_window: in how many of the last seconds; since it was forgotten by default.

        Raises:
            InputError: for a threshold below 1 or above what is remembered of a kernel.
        """
        if not 1 <= threshold <= self._max_per_kernel:
            from esper.errors import InputError

            raise InputError(
                f"a kernel cannot be judged by {threshold} errors: expected 1 to"
                f" {self._max_per_kernel}, which are remembered of each"
            )
        with self._lock:
            times = self._kernels.get(kernel_id, ())
            if time_window is None:
                return len(times) >= threshold
            since = self._clock() - time_window
            return sum(at > since for at in times) >= threshold

    def newly_problematic(self, kernel_id: str, threshold: int = 3) -> int:
        """The errors of a kernel that has failed at least `threshold` times, else 0.

        To one caller for each kernel, so that one tells of it: all others get 0, until the kernel
        is forgotten, or `not_told`.
        """
        with self._lock:
            errors = len(self._kernels.get(kernel_id, ()))
            if errors < threshold or kernel_id in self._told:
                return 0
            self._told.add(kernel_id)
            return errors

    def not_told(self, kernel_id: str) -> None:
        """Nobody could be told of a kernel: the next caller of `newly_problematic` may."""
        with self._lock:
            self._told.discard(kernel_id)

    def errors_of_kernel(self, kernel_id: str) -> int:
        """How many errors of a kernel are remembered."""
        with self._lock:
            return len(self._kernels.get(kernel_id, ()))

    def errors_by_kernel(self) -> dict[str, int]:
        """How many errors are remembered, of each kernel that has any."""
        with self._lock:
            return {kernel_id: len(times) for kernel_id, times in self._kernels.items()}

    def problematic_kernels(self, threshold: int = 3) -> list[str]:
        """The kernels that have failed at least `threshold` times, in order of their names."""
        with self._lock:
            return sorted(k for k, times in self._kernels.items() if len(times) >= threshold)

    def forget_kernel(self, kernel_id: str) -> None:
        """Forget a kernel's errors, where it has been replaced or mended."""
        with self._lock:
            self._kernels.pop(kernel_id, None)
            self._told.discard(kernel_id)

    def get_error_rate(
        self, error_type: ErrorType | None = None, time_window: float = 300.0
    ) -> float:
        """Errors per second, of one type or all, in the last `time_window` seconds.

        Where there were more than are remembered, it is the rate over the time that those cover.

        Raises:
            InputError: for a window that is not above 0.
        """
        if not time_window > 0:
            from esper.errors import InputError

            raise InputError(f"time_window must be above 0 seconds, got {time_window}")
        with self._lock:
            now = self._clock()
            recent = [e for e in self._history if now - (e.timestamp or 0.0) < time_window]
            full = len(recent) == len(self._history) == self._history.maxlen
        # Those before the oldest are forgotten: the window would count them as none.
        oldest = min((e.timestamp or 0.0 for e in recent), default=now)
        span = now - oldest if full and now > oldest else time_window
        return sum(error_type in (None, e.error_type) for e in recent) / span

    def stats(self) -> dict[str, Any]:
        """Counts and rates, JSON-able."""
        with self._lock:
            counts = dict(self._counts)
            remembered, kernels = len(self._history), len(self._kernels)
        return {
            "total_errors": sum(counts.values()),
            "errors_by_type": {kind.value: counts.get(kind, 0) for kind in ErrorType},
            "error_rate": self.get_error_rate(),
            "remembered": remembered,
            "kernels_with_errors": kernels,
            "problematic_kernels": self.problematic_kernels(),
        }

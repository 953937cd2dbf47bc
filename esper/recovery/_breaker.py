"""A circuit breaker: what keeps failing is left alone for a while, and then tried with care.

The package purgatory, of which this was to be made, reads the wall clock itself, has no lock, and
lets every caller through at once when it tries again; here the clock is an argument, and of many
threads exactly as many go through as there are probes.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from esper.contracts import CircuitEvent as CircuitEvent
from esper.contracts import CircuitState as CircuitState
from esper.recovery._check import require

MOVES: Mapping[tuple[CircuitState, CircuitEvent], CircuitState] = {
    (CircuitState.CLOSED, CircuitEvent.TRIP): CircuitState.OPEN,
    (CircuitState.OPEN, CircuitEvent.PROBE): CircuitState.HALF_OPEN,
    (CircuitState.HALF_OPEN, CircuitEvent.TRIP): CircuitState.OPEN,
    (CircuitState.HALF_OPEN, CircuitEvent.RECOVER): CircuitState.CLOSED,
    (CircuitState.HALF_OPEN, CircuitEvent.RELAPSE): CircuitState.OPEN,
    (CircuitState.OPEN, CircuitEvent.RESET): CircuitState.CLOSED,
    (CircuitState.HALF_OPEN, CircuitEvent.RESET): CircuitState.CLOSED,
}
"""All moves; whatever else happens leaves the state as it is."""


class CircuitChange(NamedTuple):
    """A breaker went from one state to another."""

    name: str
    before: CircuitState
    after: CircuitState
    event: CircuitEvent
    number: int
    """Of the breaker's changes, from 1; listeners in several threads may hear them out of order."""
    at: float
    """Seconds on the breaker's clock."""


class CircuitBreaker:
    """Counts failures in a row, and refuses calls for a while once there are too many.

    A call asks with `acquire` or `try_acquire`, and gives its permit back to `record_success`,
    `record_failure` or, where it came to no end that says anything, `release`. A permit belongs
    to the state in which it was given: what a call reports after a change changes nothing, and
    before one it counts, however long the call took. `can_proceed` asks without a permit; what
    is recorded without one counts for the state that there is.

    Args:
        failure_threshold: failures in a row that open it.
        recovery_timeout: seconds for which it stays open. Probes that report nothing for as long
            are not waited for, and others are let through.
        half_open_max_calls: calls that may probe at once; it closes when as many have succeeded,
            and opens again when one fails.
        name: for messages and events.
        clock: gives seconds, of which only differences are read.
        on_change: is told of each change, in the thread that makes it and outside of the lock.

    Raises:
        InputError: for a threshold or number of calls that is no whole number from 1, or a
            negative time.
    """

    def __init__(
        self,
        failure_threshold: int = 5,
        recovery_timeout: float = 60.0,
        half_open_max_calls: int = 2,
        *,
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[CircuitChange], object] | None = None,
    ) -> None:
        of = "of a circuit breaker"
        require(f"failure_threshold {of}", failure_threshold, 1, whole=True)
        require(f"half_open_max_calls {of}", half_open_max_calls, 1, whole=True)
        require(f"recovery_timeout {of}", recovery_timeout, 0, math.inf)
        self.name = name
        self.failure_threshold = failure_threshold
        self.recovery_timeout = recovery_timeout
        self.half_open_max_calls = half_open_max_calls
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._state = CircuitState.CLOSED
        self._round = 0
        self._first_round = 0
        self._changes = 0
        self._since = clock()
        self._failures = 0
        self._probing = 0
        self._succeeded = 0
        self._opened = 0
        self._refused = 0

    @property
    def state(self) -> CircuitState:
        """The state; it stays open until a call asks after its time."""
        return self._state

    @property
    def retry_after(self) -> float:
        """Seconds until a call may go through; 0 where one may now."""
        with self._lock:
            return self._retry_after(self._clock())

    def acquire(self) -> int:
        """Ask to make a call.

        Returns:
            The permit.

        Raises:
            CircuitBreakerOpenError: saying for how long there is none.
        """
        permit, wait = self._ask()
        if permit is not None:
            return permit
        from esper.errors import CircuitBreakerOpenError

        half_open = self._state is CircuitState.HALF_OPEN
        probed = "; the calls that probe it have not reported yet" if half_open else ""
        raise CircuitBreakerOpenError(
            f"the circuit breaker of {self.name or 'this service'} is {self._state.value}, because"
            f" calls failed: none is made for another {wait:.1f} s{probed}. Do without it until"
            " then, or reset() the breaker."
        )

    def try_acquire(self) -> int | None:
        """A permit to make a call, or None where there is none."""
        return self._ask()[0]

    def can_proceed(self) -> bool:
        """Whether a call may be made; True for as many as there are probes where it is half-open.

        Each True is to be answered by `record_success` or `record_failure`.
        """
        return self.try_acquire() is not None

    def record_success(self, permit: int | None = None) -> None:
        """A call succeeded."""
        changes: list[CircuitChange] = []
        with self._lock:
            if self._counts(permit):
                if self._state is CircuitState.CLOSED:
                    self._failures = 0
                elif self._state is CircuitState.HALF_OPEN:
                    self._probe_succeeded(permit, changes)
        self._tell(changes)

    def record_failure(self, permit: int | None = None) -> None:
        """A call failed."""
        changes: list[CircuitChange] = []
        with self._lock:
            if self._counts(permit):
                if self._state is CircuitState.CLOSED:
                    self._failures += 1
                    if self._failures >= self.failure_threshold:
                        self._move(CircuitEvent.TRIP, changes)
                elif self._state is CircuitState.HALF_OPEN:
                    self._move(CircuitEvent.RELAPSE, changes)
        self._tell(changes)

    def release(self, permit: int) -> None:
        """A call ended in neither way, such as by an interruption: another may probe instead."""
        with self._lock:
            if permit == self._round and self._probing:
                self._probing -= 1

    def trip(self) -> None:
        """Open it by hand."""
        self._by_hand(CircuitEvent.TRIP)

    def reset(self) -> None:
        """Close it by hand, and forget the failures counted."""
        self._by_hand(CircuitEvent.RESET)

    def stats(self) -> dict[str, Any]:
        """State and counts, JSON-able."""
        with self._lock:
            return {
                "state": self._state.value,
                "failures_in_a_row": self._failures,
                "retry_after": self._retry_after(self._clock()),
                "times_opened": self._opened,
                "calls_refused": self._refused,
            }

    def _by_hand(self, event: CircuitEvent) -> None:
        changes: list[CircuitChange] = []
        with self._lock:
            if event is CircuitEvent.RESET:
                self._failures = 0
            self._move(event, changes)
        self._tell(changes)

    def _ask(self) -> tuple[int | None, float]:
        """A permit or None, and the seconds to wait."""
        changes: list[CircuitChange] = []
        with self._lock:
            now = self._clock()
            if self._state is CircuitState.OPEN and self._waited(now):
                self._move(CircuitEvent.PROBE, changes)
            permit: int | None = self._round
            if self._state is CircuitState.HALF_OPEN:
                if self._probing + self._succeeded >= self.half_open_max_calls:
                    if self._waited(now):
                        self._begin_round(now)
                    else:
                        permit = None
                if permit is not None:
                    self._probing += 1
                    permit = self._round
            elif self._state is CircuitState.OPEN:
                permit = None
            if permit is None:
                self._refused += 1
            wait = self._retry_after(now)
        self._tell(changes)
        return permit, wait

    def _waited(self, now: float) -> bool:
        return now - self._since >= self.recovery_timeout

    def _retry_after(self, now: float) -> float:
        left = max(0.0, self.recovery_timeout - (now - self._since))
        full = self._probing + self._succeeded >= self.half_open_max_calls
        if self._state is CircuitState.OPEN or (self._state is CircuitState.HALF_OPEN and full):
            return left
        return 0.0

    def _counts(self, permit: int | None) -> bool:
        return permit is None or permit >= self._first_round

    def _probe_succeeded(self, permit: int | None, changes: list[CircuitChange]) -> None:
        if permit in (None, self._round):
            if not self._probing:  # nobody has asked
                return
            self._probing -= 1
        self._succeeded += 1
        if self._succeeded >= self.half_open_max_calls:
            self._move(CircuitEvent.RECOVER, changes)

    def _begin_round(self, now: float) -> None:
        # Probes of the round before are not waited for, but what they report still counts.
        self._round += 1
        self._since = now
        self._probing = 0

    def _move(self, event: CircuitEvent, changes: list[CircuitChange]) -> None:
        before, after = self._state, MOVES.get((self._state, event), self._state)
        if after is before:
            return
        now = self._clock()
        self._begin_round(now)
        self._first_round = self._round
        self._succeeded = 0
        self._state = after
        self._changes += 1
        if after is CircuitState.CLOSED:
            self._failures = 0
        self._opened += after is CircuitState.OPEN
        changes.append(CircuitChange(self.name, before, after, event, self._changes, now))

    def _tell(self, changes: list[CircuitChange]) -> None:
        for change in changes if self._on_change is not None else ():
            self._on_change(change)  # pyright: ignore[reportOptionalCall]

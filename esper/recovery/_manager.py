"""What is done about errors: retried, replaced, done without, left alone, or told to somebody."""

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from esper.oona import Bus
from esper.recovery._account import Account
from esper.recovery._attempts import Action, Attempted, once, repeatedly
from esper.recovery._breaker import CircuitBreaker
from esper.recovery._check import require
from esper.recovery._classify import Classifier, Rule
from esper.recovery._effects import Effects, with_async_sleep, with_sleep
from esper.recovery._escalation import Escalation
from esper.recovery._guard import NOT_THE_SERVICES, Guard
from esper.recovery._journal import Journal, Recovery
from esper.recovery._retry import RetryPolicy
from esper.recovery._tracker import MAX_PER_KERNEL, ErrorTracker
from esper.recovery._types import ErrorContext, ErrorType, RecoveryStrategy, strategies_with

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

T = TypeVar("T")


def _anything(_: Any) -> bool:
    return True


def _not_false(result: Any) -> bool:
    return result is not False


class ErrorRecoveryManager:
    """Handles errors by their types, and keeps account of it. Threads may share one.

    Nothing is reported as recovered unless a function that the caller gave was called and worked:
    it returned, and not False.

    Args:
        max_retries: how often something is tried in all.
        base_delay: seconds before the second attempt; doubled for each one after it.
        seed: of the jitter of delays.
        retry: another policy, in place of these three.
        strategies: what is done about errors of a type, where it is not what `STRATEGIES` says.
        rules: how exceptions are classified besides; see `Classifier`.
        failure_threshold: failures in a row that open a circuit breaker.
        recovery_timeout: seconds for which it stays open.
        half_open_max_calls: calls that probe it then.
        problematic_after: errors of one kernel from which on somebody is told of it, once, however
            they were recorded; from 1 to 100.
        escalate_after: recoveries in a row without success, of one type at one place, of which
            somebody is told.
        on_escalate: tells somebody. What it raises is recorded, and stops nothing. It is a plain
            function where `record_error` may call it, as an executor does, which cannot wait.
        bus: errors, recoveries and changes of breakers are published on it.
        registry: they are counted in it; see `docs/recovery.md` for the names.
        max_history: errors and recoveries that are remembered.
        clock: gives seconds, of which only differences are read.
        sleep: lets seconds pass in a thread.
        async_sleep: lets seconds pass in an event loop.

    Raises:
        InputError: for numbers out of their bounds, or strategies that there are not.
    """

    def __init__(
        self,
        max_retries: int = 3,
        base_delay: float = 0.1,
        *,
        seed: int = 0,
        retry: RetryPolicy | None = None,
        strategies: Mapping[ErrorType, RecoveryStrategy] | None = None,
        rules: Mapping[type[BaseException] | str, Rule] | None = None,
        failure_threshold: int = 5,
        recovery_timeout: float = 60.0,
        half_open_max_calls: int = 2,
        problematic_after: int = 3,
        escalate_after: int = 3,
        on_escalate: Callable[[ErrorContext], Any] | None = None,
        bus: Bus | None = None,
        registry: "CollectorRegistry | None" = None,
        max_history: int = 1000,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        async_sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        of = "of an error recovery manager"
        # No more errors of a kernel are remembered than that.
        require(f"problematic_after {of}", problematic_after, 1, MAX_PER_KERNEL, whole=True)
        require(f"escalate_after {of}", escalate_after, 1, whole=True)
        self.retry = retry or RetryPolicy(max_retries, base_delay, seed=seed)
        self.draws = random.Random(self.retry.seed)
        self.strategies = strategies_with(strategies or {})
        self.classify = Classifier(rules)
        self.error_tracker = ErrorTracker(max_history=max_history, clock=clock)
        self.journal = Journal(bus, registry)
        self._account = Account(max_history)
        self._escalation = Escalation(
            on_escalate, problematic_after, escalate_after, self.error_tracker, self._account
        )
        self.clock = clock
        self.sleep = sleep
        self.async_sleep = async_sleep
        self._breaker_options: Mapping[str, Any] = {
            "failure_threshold": failure_threshold,
            "recovery_timeout": recovery_timeout,
            "half_open_max_calls": half_open_max_calls,
            "clock": clock,
            "on_change": self.journal.circuit,
        }
        CircuitBreaker(**self._breaker_options)  # what is wrong with them is said here
        self._lock = threading.Lock()
        self._breakers: dict[str, CircuitBreaker] = {}
        self._active: set[tuple[str, str, int | None]] = set()

    async def handle_error(
        self,
        context: ErrorContext,
        fallback_action: Action | None = None,
        *,
        retry_action: Action | None = None,
        degrade_action: Action | None = None,
    ) -> bool:
        """Record an error, and do about it what its type asks for.

        Args:
            fallback_action: what is done instead, where what comes before it has not worked.
            retry_action: what is tried again, for types that are retried.
            degrade_action: how to do less, for types that ask for it.

        Returns:
            Whether one of the actions worked. False too where another thread is recovering at
            this place already, and nothing was called.
        """
        effects = self._handle(context, fallback_action, retry_action, degrade_action)
        return await with_async_sleep(effects, self.async_sleep)

    def handle_error_sync(
        self,
        context: ErrorContext,
        fallback_action: Action | None = None,
        *,
        retry_action: Action | None = None,
        degrade_action: Action | None = None,
    ) -> bool:
        """`handle_error` without an event loop; the actions are plain functions."""
        effects = self._handle(context, fallback_action, retry_action, degrade_action)
        return with_sleep(effects, self.sleep)

    async def recover_from_error(
        self,
        error: Exception,
        context: ErrorContext | Mapping[str, Any],
        recovery_fn: Callable[[], Awaitable[T]] | Callable[[], T],
    ) -> T:
        """Have a function make good for an error: several times where its type is retried.

        Args:
            context: where it happened; as a mapping, the keys of `ErrorContext`, and whatever
                else there is to say.

        Returns:
            What the function returned.

        Raises:
            Exception: `error`, with a note of what was tried, where the function did not succeed
                or the breaker of this component and type is open; without a note where it is no
                failure but an answer, for which nothing is called.
        """
        return await with_async_sleep(self._recover(error, context, recovery_fn), self.async_sleep)

    def recover_from_error_sync(
        self,
        error: Exception,
        context: ErrorContext | Mapping[str, Any],
        recovery_fn: Callable[[], T],
    ) -> T:
        """`recover_from_error` without an event loop; the function is a plain one."""
        return with_sleep(self._recover(error, context, recovery_fn), self.sleep)

    def guard(self, name: str, *, answers: frozenset[ErrorType] = NOT_THE_SERVICES) -> Guard:
        """A function that calls a service: `guard(action)` returns what `action()` returns.

        A call that fails is made again where its type is retried, and counts at the breaker of
        this name. What the classifier calls no failure, such as a KernelNotFoundError, passes
        through as it is raised, and counts as the service's success.

        Args:
            answers: types of errors that are recorded, but are not the service's fault.
        """
        return Guard(self, name, answers)

    def breaker(self, name: str, error_type: ErrorType | None = None) -> CircuitBreaker:
        """The breaker of a name; with a type, that of a component for errors of the type.

        It is made when it is first asked for, and kept: a name is a component's, not a kernel's.
        """
        full = name if error_type is None else f"{name}:{ErrorType(error_type).value}"
        with self._lock:
            if full not in self._breakers:
                self._breakers[full] = CircuitBreaker(name=full, **self._breaker_options)
            return self._breakers[full]

    def record_error(self, context: ErrorContext) -> ErrorContext:
        """Remember an error and tell of it, and do nothing about it.

        Where its kernel has failed too often, `on_escalate` is told.

        Returns:
            What is remembered.
        """
        kept = self._remember(context)
        escalated, detail = with_sleep(self._escalation.tell(context, []), self.sleep)
        if escalated:
            strategy = self.strategies[kept.error_type]
            self.record_recovery(kept, strategy, False, escalated=True, detail=detail, tried=False)
        return kept

    def record_recovery(
        self,
        context: ErrorContext,
        strategy: RecoveryStrategy,
        recovered: bool,
        *,
        action: str = "nothing",
        attempts: int = 0,
        escalated: bool = False,
        detail: str = "",
        tried: bool = True,
    ) -> None:
        """Remember what was done about an error, here or by somebody else, and tell of it.

        Args:
            context: the error, as `record_error` returned it.
            tried: False where nothing was to be done, which is counted apart.
        """
        recovery = Recovery(
            context, strategy, recovered, action, attempts, escalated, detail, self.clock(), tried
        )
        self._account.record(recovery)
        self.journal.recovery(recovery)

    def count_retry(self, component: str) -> None:
        """A call is made again."""
        self._account.count_retry()
        self.journal.retry(component)

    @property
    def recoveries(self) -> list[Recovery]:
        """What is remembered of what was done, oldest first."""
        return self._account.recoveries

    def get_recovery_stats(self) -> dict[str, Any]:
        """Counts since the beginning, and the state of everything; JSON-able.

        `recovery_success_rate` is from 0 to 1, and None where nothing was to be recovered;
        `recent_recoveries` are those remembered of the last hour; `untried_recoveries`, of which
        all the others know nothing, found another under way at their place, or only told somebody.
        """
        with self._lock:
            active, breakers = len(self._active), dict(self._breakers)
        return {
            **self._account.stats(self.clock()),
            "active_recoveries": active,
            "circuit_breakers": {name: b.stats() for name, b in sorted(breakers.items())},
            "error_stats": self.error_tracker.stats(),
        }

    def _handle(
        self,
        context: ErrorContext,
        fallback: Action | None,
        retry: Action | None,
        degrade: Action | None,
    ) -> Effects[bool]:
        kept = self._remember(context)
        strategy = self.strategies[context.error_type]
        if strategy is RecoveryStrategy.CIRCUIT_BREAKER:
            self.breaker(context.component, context.error_type).record_failure()
        with self._lock:
            busy = context.place in self._active
            if not busy:
                self._active.add(context.place)
        if busy:
            escalated, detail = yield from self._escalation.tell(context, [])
            why = "nothing was called: a recovery at this place is under way already"
            self.record_recovery(
                kept, strategy, False, escalated=escalated, tried=False,
                detail=f"{why}; {detail}" if detail else why,
            )  # fmt: skip
            return False
        try:
            reasons = self._escalation.reasons(kept, strategy)
            escalated, detail = yield from self._escalation.tell(context, reasons)
            actions: list[tuple[str, Effects[Attempted]]] = []
            if strategy is RecoveryStrategy.RETRY and retry is not None:
                actions.append(("retry", self._again(context, retry, _not_false)))
            if strategy is RecoveryStrategy.GRACEFUL_DEGRADATION and degrade is not None:
                actions.append(("degrade", once(degrade, _not_false)))
            if fallback is not None:
                actions.append(("fallback", once(fallback, _not_false)))
            name, attempts, worked = "nothing", 0, False
            details = [detail] if detail else []
            for name, effects in actions:
                tried = yield from effects
                attempts, worked = attempts + tried.attempts, tried.worked
                details += [f"{name}: {tried.detail}"] if tried.detail else []
                if worked:
                    break
            if not actions:
                details.append(f"no function was given by which to {strategy.value}")
            self.record_recovery(
                kept, strategy, worked, action=name, attempts=attempts, escalated=escalated,
                detail="; ".join(details),
            )  # fmt: skip
            return worked
        finally:
            with self._lock:
                self._active.discard(context.place)

    def _recover(
        self,
        error: Exception,
        context: ErrorContext | Mapping[str, Any],
        recovery_fn: Callable[[], Any],
    ) -> Effects[Any]:
        kind = self.classify(error)
        if kind is None:
            raise error
        full = _completed(context, kind, error)
        kept = self._remember(full)
        strategy = self.strategies[full.error_type]
        reasons = self._escalation.reasons(kept, strategy)
        escalated, detail = yield from self._escalation.tell(full, reasons)
        if strategy is RecoveryStrategy.RETRY:
            tried = yield from self._again(full, recovery_fn, _anything)
        else:
            # Nothing that waiting would change.
            breaker = self.breaker(full.component, full.error_type)
            tried = yield from once(recovery_fn, _anything, breaker)
        self.record_recovery(
            kept, strategy, tried.worked, action="recovery", attempts=tried.attempts,
            escalated=escalated, detail="; ".join(d for d in (detail, tried.detail) if d),
        )  # fmt: skip
        if tried.worked:
            return tried.result
        error.add_note(f"recovery failed after {tried.attempts} attempts: {tried.detail}")
        raise error

    def _remember(self, context: ErrorContext) -> ErrorContext:
        kept = self.error_tracker.record_error(context)
        self.journal.error(kept)
        return kept

    def _again(
        self, context: ErrorContext, action: Action, works: Callable[[Any], bool]
    ) -> Effects[Attempted]:
        breaker = self.breaker(context.component, context.error_type)
        delays = self.retry.delays(self.draws)
        on_attempt = lambda: self.count_retry(context.component)  # noqa: E731
        return repeatedly(action, breaker, self.retry.attempts, delays, on_attempt, works)


_FIELDS = {field.name for field in dataclasses.fields(ErrorContext)}


def _completed(
    context: ErrorContext | Mapping[str, Any], kind: ErrorType, error: Exception
) -> ErrorContext:
    if isinstance(context, ErrorContext):
        return dataclasses.replace(context, exception=context.exception or error)
    known = {key: value for key, value in context.items() if key in _FIELDS}
    other = {key: value for key, value in context.items() if key not in _FIELDS}
    metadata = {**known.pop("metadata", {}), **other}
    own = {"error_type": kind, "component": "unknown", "exception": error}
    return ErrorContext(**(own | known), metadata=metadata)

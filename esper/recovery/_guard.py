"""A breaker and retries around the calls of a service."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from esper.recovery._attempts import through
from esper.recovery._effects import Effects, Wait, with_async_sleep, with_sleep
from esper.recovery._types import ErrorContext, ErrorType, RecoveryStrategy

if TYPE_CHECKING:
    from esper.recovery._manager import ErrorRecoveryManager

T = TypeVar("T")

NOT_THE_SERVICES = frozenset({ErrorType.KERNEL_VALIDATION})
"""Failures of what a service gave; it answered."""


class Guard:
    """`guard(action)` calls a service and returns what it returns; see `guard` of the manager."""

    def __init__(
        self, manager: "ErrorRecoveryManager", name: str, answers: frozenset[ErrorType]
    ) -> None:
        self.breaker = manager.breaker(name)
        self._manager = manager
        self._name = name
        self._answers = answers

    def __call__(self, action: Callable[[], T]) -> T:
        """Call it, again where that may help.

        Raises:
            CircuitBreakerOpenError: at once, where it has failed too often.
            Exception: what the last call raised.
        """
        return with_sleep(self._effects(action), self._manager.sleep)

    async def call_async(self, action: Callable[[], Awaitable[T]]) -> T:
        """The same in an event loop, where waiting holds up nobody."""
        return await with_async_sleep(self._effects(action), self._manager.async_sleep)

    def _fails(self, error: Exception) -> bool:
        kind = self._manager.classify(error)
        return kind is not None and kind not in self._answers

    def _effects(self, action: Callable[[], Any]) -> Effects[Any]:
        manager, breaker = self._manager, self.breaker
        delays = manager.retry.delays(manager.draws)
        permit: int | None = breaker.acquire()
        made, last = 0, None
        while permit is not None:
            made += 1
            try:
                result = yield from through(breaker, permit, action, self._fails)
            except Exception as error:
                kind = manager.classify(error)
                answered = kind is None or kind in self._answers
                if answered:
                    self._recovered(last, made)
                if kind is None:
                    raise
                last = manager.record_error(ErrorContext(kind, self._name, exception=error))
                again = manager.strategies[kind] is RecoveryStrategy.RETRY
                permit = None
                delay = next(delays)
                # Where it is open for longer than that, waiting is in vain.
                if again and made < manager.retry.attempts and breaker.retry_after <= delay:
                    yield Wait(delay)
                    permit = breaker.try_acquire()
                if permit is None:
                    if again or (made > 1 and not answered):
                        self._gave_up(last, made, error)
                    raise
                manager.count_retry(self._name)
            else:
                self._recovered(last, made)
                return result

    def _recovered(self, last: ErrorContext | None, made: int) -> None:
        """The service has answered, after an error where there was one."""
        if last is not None:
            self._manager.record_recovery(
                last, RecoveryStrategy.RETRY, True, action="retry", attempts=made - 1
            )

    def _gave_up(self, last: ErrorContext, made: int, error: Exception) -> None:
        state = self.breaker.state.value
        detail = f"tried {made} times; the circuit breaker of {self._name} is {state}"
        error.add_note(detail)
        self._manager.record_recovery(
            last, RecoveryStrategy.RETRY, False, action="retry", attempts=made - 1, detail=detail
        )

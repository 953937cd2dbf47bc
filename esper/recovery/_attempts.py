"""Calls through a circuit breaker, once or several times."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from esper.recovery._breaker import CircuitBreaker
from esper.recovery._effects import Call, Effects, Wait
from esper.recovery._types import described

Action = Callable[[], Any]


class Attempted(NamedTuple):
    """What came of trying."""

    worked: bool
    result: Any
    attempts: int
    """Calls that were made."""
    detail: str
    """Why it did not work."""


def through(
    breaker: CircuitBreaker, permit: int, action: Action, fails: Callable[[Exception], bool]
) -> Effects[Any]:
    """One call with a permit, which is given back whatever happens.

    Args:
        fails: whether what was raised counts as a failure of what the breaker stands before.
    """
    reported = False
    try:
        result = yield Call(action)
    except Exception as error:
        reported = True
        (breaker.record_failure if fails(error) else breaker.record_success)(permit)
        raise
    else:
        reported = True
        breaker.record_success(permit)
        return result
    finally:
        if not reported:
            breaker.release(permit)


def repeatedly(
    action: Action,
    breaker: CircuitBreaker,
    attempts: int,
    delays: Iterator[float],
    on_attempt: Callable[[], object],
    works: Callable[[Any], bool],
) -> Effects[Attempted]:
    """Try until it works; something has failed before, so that each attempt is waited for.

    An attempt that returns what does not work is as one that raises, but for the breaker, which
    it has answered.
    """
    detail = ""
    for made in range(attempts):
        delay = next(delays)
        permit = None
        # Where it is open for longer than that, waiting is in vain.
        if breaker.retry_after <= delay:
            yield Wait(delay)
            permit = breaker.try_acquire()
        if permit is None:
            refused = f"not tried any more: the circuit breaker of {breaker.name} is open"
            return Attempted(False, None, made, f"{detail}; {refused}" if detail else refused)
        on_attempt()
        try:
            result = yield from through(breaker, permit, action, lambda _: True)
        except Exception as error:
            detail = described(error)
        else:
            if works(result):
                return Attempted(True, result, made + 1, "")
            detail = f"it returned {result!r}"[:200]
    return Attempted(False, None, attempts, detail)


def once(
    action: Action, works: Callable[[Any], bool], breaker: CircuitBreaker | None = None
) -> Effects[Attempted]:
    """Try once, where the breaker lets it through."""
    permit = None if breaker is None else breaker.try_acquire()
    if breaker is not None and permit is None:
        refused = f"not tried: the circuit breaker of {breaker.name} is open"
        return Attempted(False, None, 0, refused)
    try:
        if breaker is not None and permit is not None:
            result = yield from through(breaker, permit, action, lambda _: True)
        else:
            result = yield Call(action)
    except Exception as error:
        return Attempted(False, None, 1, described(error))
    detail = "" if works(result) else f"it returned {result!r}"[:200]
    return Attempted(not detail, result, 1, detail)

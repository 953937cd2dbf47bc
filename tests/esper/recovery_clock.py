"""Time turned by hand, for tests: nothing sleeps. And a manager on it, and what it is given."""

from esper.recovery import ErrorContext, ErrorRecoveryManager, ErrorType


class Hand:
    """A clock, and two ways to let time pass on it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


def managed(**options):
    """A manager on a clock of its own, which nothing has to wait for."""
    hand = Hand()
    manager = ErrorRecoveryManager(
        clock=hand, sleep=hand.sleep, async_sleep=hand.async_sleep, **options
    )
    return manager, hand


def failing(times: int, error: Exception | None = None, result="done"):
    """Raises so many times, then returns; `calls` counts."""

    def action():
        action.calls += 1
        if action.calls <= times:
            raise error or ConnectionError("away")
        return result

    action.calls = 0
    return action


def context(kind=ErrorType.NETWORK_ERROR, **where) -> ErrorContext:
    return ErrorContext(kind, "kernel_cache", **where)

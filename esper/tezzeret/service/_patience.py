"""Calls of a service that may be away: made again until it is back."""

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from esper.errors import (
    CircuitBreakerOpenError,
    LibraryError,
    ServiceUnavailableError,
)
from esper.recovery import RetryPolicy
from esper.tezzeret.service._bell import Bell

T = TypeVar("T")

POLICY = RetryPolicy(base_delay=0.2, factor=2.0, max_delay=5.0, jitter=1.0)
"""How long is waited for what is away; its number of attempts is not read."""


def is_away(error: BaseException) -> bool:
    """Whether a library could not answer, unlike one that gave an answer that is an error."""
    # The kinds of a LibraryError are answers: it holds no such kernel, the lease is lost.
    return type(error) is LibraryError or isinstance(
        error, ServiceUnavailableError | CircuitBreakerOpenError | OSError
    )


class Patience:
    """Makes a call again, while the service does not answer and there is time.

    Args:
        on_away: told of each call that had no answer: what was called, what was raised, and how
            many such calls there were in a row.
        policy: the waits in between.
        draws: their jitter.
        clock: gives seconds, of which only differences are read.
    """

    def __init__(
        self,
        on_away: Callable[[str, Exception, int], object],
        *,
        policy: RetryPolicy = POLICY,
        draws: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_away = on_away
        self._policy = policy
        self._draws = draws or random.Random(policy.seed)
        self._clock = clock
        self._limit = float("inf")
        self._bell = Bell()

    def end_by(self, moment: float) -> None:
        """From that moment of the clock on no call is made again, nor waited for."""
        self._limit = moment
        self._bell.ring()

    def delays(self) -> Iterator[float]:
        """The waits after the first, second, ... call without an answer."""
        return self._policy.delays(self._draws)

    def __call__(self, what: str, action: Callable[[], T], seconds: float) -> T:
        """Call it until there is an answer.

        Args:
            what: of whoever reads about it.
            seconds: for how long at most.

        Raises:
            Exception: what the last call raised.
        """
        give_up = self._clock() + seconds
        for missed, delay in enumerate(self.delays(), start=1):
            try:
                return action()
            except Exception as error:
                if not is_away(error):
                    raise
                self._on_away(what, error, missed)
                until = min(give_up, self._limit)
                if self._clock() + delay >= until:
                    raise
                again = self._clock() + delay
                while (left := min(again, self._limit) - self._clock()) > 0:
                    self._bell.wait(left)
        raise AssertionError("delays have no end")

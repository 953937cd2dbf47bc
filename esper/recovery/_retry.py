"""How often something is tried, and how long is waited in between.

The package stamina, of which this was to be made, sleeps by itself, draws its jitter from the
process's one random generator, which is the user's, and can be switched off for a whole process;
here the wait is returned as a number, from a generator of its own.
"""

import dataclasses
import random
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter.

    Args:
        attempts: how often something is tried in all, at least 1.
        base_delay: seconds before the second attempt, without jitter.
        factor: what each delay is multiplied by for the next.
        max_delay: longest delay in seconds.
        jitter: a delay is lengthened by up to this share of it, drawn evenly.
        seed: of the draws. Processes that call one service get different ones.

    Raises:
        InputError: for fewer than one attempt, a factor below 1, or a negative delay or jitter.
    """

    attempts: int = 3
    base_delay: float = 0.1
    factor: float = 2.0
    max_delay: float = 5.0
    jitter: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        delays = (self.base_delay, self.max_delay, self.jitter)
        if self.attempts < 1 or not self.factor >= 1 or not all(d >= 0 for d in delays):
            from esper.errors import InputError

            raise InputError(
                "a retry needs at least 1 attempt, a factor of at least 1, and delays and jitter"
                f" of at least 0, got {self}"
            )

    def delays(self, draws: random.Random) -> Iterator[float]:
        """The delays after the first, second, ... failure, without end."""
        delay = self.base_delay
        while True:
            yield min(self.max_delay, delay) * (1.0 + self.jitter * draws.random())
            # Beyond the longest it need not grow, and would overflow in the end.
            delay = min(self.max_delay, delay * self.factor)

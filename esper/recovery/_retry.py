"""How often something is tried, and how long is waited in between.

The package stamina, of which this was to be made, sleeps by itself, draws its jitter from the
process's one random generator, which is the user's, and can be switched off for a whole process;
here the wait is returned as a number, from a generator of its own.
"""

import dataclasses
import math
import random
from collections.abc import Iterator

from esper.recovery._check import require


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
        InputError: for attempts that are no whole number from 1, a factor below 1, or a negative
            delay or jitter; and for what is infinite, but for `max_delay`.
    """

    attempts: int = 3
    base_delay: float = 0.1
    factor: float = 2.0
    max_delay: float = 5.0
    jitter: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        require("attempts of a retry", self.attempts, 1, whole=True)
        require("factor of a retry", self.factor, 1)
        require("base_delay of a retry", self.base_delay, 0)
        require("max_delay of a retry", self.max_delay, 0, math.inf)
        require("jitter of a retry", self.jitter, 0)

    def delays(self, draws: random.Random) -> Iterator[float]:
        """The delays after the first, second, ... failure, without end."""
        delay = self.base_delay
        while True:
            yield min(self.max_delay, delay) * (1.0 + self.jitter * draws.random())
            # Beyond the longest it need not grow, and would overflow in the end.
            delay = min(self.max_delay, delay * self.factor)

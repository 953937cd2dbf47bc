"""Announcements that wait for the bus, which may be away."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from esper.contracts import OonaMessage
from esper.errors import InputError
from esper.recovery import RetryPolicy
from esper.tezzeret.service._patience import POLICY

_MOST_AT_ONCE = 256


class Publisher(Protocol):
    """What an outbox needs of a bus."""

    def publish(self, messages: Sequence[OonaMessage]) -> object:
        """Returns once the bus has them."""
        ...


class Outbox:
    """Takes messages at once, and publishes them from a thread, in order, when the bus is there.

    A bus that is away costs nothing but what no longer has room, oldest first, and is counted.

    Args:
        bus: None for none: then everything is dropped, and nothing counted.
        capacity: how many messages wait at most.
        on_away: told of each time that the bus did not take what it was given.
        policy: the waits in between.
        draws: their jitter.
    """

    def __init__(
        self,
        bus: Publisher | None,
        *,
        capacity: int = 10_000,
        on_away: Callable[[str, Exception, int], object],
        policy: RetryPolicy = POLICY,
        draws: random.Random | None = None,
    ) -> None:
        self.dropped = 0
        """How many messages were lost: for want of room, refused, or left at the end."""
        self.published = 0
        """How many messages the bus has taken."""
        self._bus = bus
        self._capacity = capacity
        self._on_away = on_away
        self._policy = policy
        self._draws = draws or random.Random(policy.seed)
        self._waiting: deque[OonaMessage] = deque()
        self._going: list[OonaMessage] = []
        self._changed = threading.Condition()
        self._closing = False
        self._give_up = float("inf")
        self._thread = threading.Thread(target=self._run, name="esper-outbox", daemon=True)
        if bus is not None:
            self._thread.start()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._going)

    def put(self, message: OonaMessage) -> None:
        """Announce it, now or later; never waits, never raises."""
        if self._bus is None:
            return
        with self._changed:
            self._waiting.append(message)
            if len(self) > self._capacity:
                # What is on its way may have arrived.
                self._waiting.popleft()
                self.dropped += 1
            self._changed.notify_all()

    def close(self, seconds: float = 5.0) -> None:
        """Publish what waits, for so long at most; the rest is dropped."""
        if self._bus is None:
            return
        with self._changed:
            self._closing = True
            self._give_up = time.monotonic() + seconds
            self._changed.notify_all()
        # A call of the bus may hang for longer; its thread ends with the process.
        self._thread.join(seconds + 1.0)
        with self._changed:
            self.dropped += len(self)
            self._waiting.clear()
            self._going.clear()

    def _run(self) -> None:
        assert self._bus is not None
        delays, missed = self._policy.delays(self._draws), 0
        while self._next():
            try:
                self._bus.publish(self._going)
            except InputError as error:
                # It would be refused again, and nothing after it would ever go.
                self._on_away("announcing", error, 1)
                self._gone(published=False)
            except Exception as error:
                # What nobody foresaw, too: without this thread nothing would ever be announced.
                missed += 1
                self._on_away("announcing", error, missed)
                if not self._pause(next(delays)):
                    return
            else:
                self._gone(published=True)
                delays, missed = self._policy.delays(self._draws), 0

    def _next(self) -> bool:
        """Choose what to publish next, which is what could not be; False at the end."""
        with self._changed:
            while not self._going:
                if self._waiting:
                    count = min(len(self._waiting), _MOST_AT_ONCE)
                    self._going = [self._waiting.popleft() for _ in range(count)]
                elif self._closing:
                    return False
                else:
                    self._changed.wait()
        return True

    def _gone(self, *, published: bool) -> None:
        with self._changed:
            if published:
                self.published += len(self._going)
            else:
                self.dropped += len(self._going)
            self._going = []

    def _pause(self, seconds: float) -> bool:
        """Wait, less where the end is near; whether there is time for another try."""
        with self._changed:
            until = time.monotonic() + seconds
            while (left := min(until, self._give_up) - time.monotonic()) > 0:
                self._changed.wait(left)
            return time.monotonic() < self._give_up

"""Publishing in batches: one call of the broker for many messages, and a bound on what waits."""

import dataclasses
import random
import threading
import time
from collections import deque
from types import TracebackType
from typing import Literal, Self, get_args

from esper.contracts import OonaMessage
from esper.errors import BusError, BusFullError, EsperError, InputError, MessageError
from esper.oona._broker import Broker

WhenFull = Literal["block", "refuse"]
"""What one does who publishes while too much waits: wait for room, or get `BusFullError`."""

_SHORTEST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0


@dataclasses.dataclass(frozen=True)
class PublisherStatistics:
    """What a publisher has done, and what waits."""

    waiting: int
    """Messages that no broker has taken yet."""
    waiting_bytes: int
    published: int
    """Messages that the broker has taken."""
    batches: int
    """In so many calls."""
    blocked: int
    """Calls of `publish` that waited for room."""
    refused: int
    """Calls of `publish` that found none."""
    failures: int
    """Calls of the broker that failed and were made again."""
    last_error: str
    """What the last of them, or of those that rejected a message, said; empty where none did."""
    rejected: int
    """Messages that the broker refused by themselves, which are not published."""


class BatchingPublisher:
    """Publishes messages in batches, in their order, from a thread of its own.

    A batch goes when it has `max_messages` or `max_bytes`, or its first message has waited for
    `max_seconds`. While the broker cannot be reached or is full, the batch is tried again and the
    rest waits. A batch that a full stream refuses is halved, as it may be larger than the stream.
    Only a message that the broker refuses by itself is dropped; `statistics` counts it as rejected.
    A context manager, which closes it.

    Args:
        broker: what publishes; it stays open.
        capacity: messages that wait at most.
        when_full: what `publish` does then.
        timeout_seconds: how long it waits for room, where it waits.

    Raises:
        InputError: for a limit that cannot be.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        max_messages: int = 256,
        max_bytes: int = 1 << 18,
        max_seconds: float = 0.02,
        capacity: int = 16_384,
        when_full: WhenFull = "block",
        timeout_seconds: float = 30.0,
    ) -> None:
        limits = {"max_messages": max_messages, "max_bytes": max_bytes, "capacity": capacity}
        for name, value in limits.items():
            if value < 1:
                raise InputError(f"{name} is at least 1, got {value!r}")
        if not max_seconds >= 0.0 or not timeout_seconds >= 0.0:
            raise InputError(
                "max_seconds and timeout_seconds are at least 0, got"
                f" {max_seconds!r} and {timeout_seconds!r}"
            )
        if when_full not in get_args(WhenFull):
            raise InputError(f"when full, it is to 'block' or to 'refuse', not {when_full!r}")
        self._broker = broker
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._capacity = capacity
        self._when_full: WhenFull = when_full
        self._timeout = timeout_seconds
        self._queue: deque[tuple[OonaMessage, int, float]] = deque()
        """Messages, their bytes, and since when they wait."""
        self._bytes = 0
        self._taken = self._published = self._batches = 0
        self._blocked = self._refused = self._failures = self._rejected = 0
        self._last_error = ""
        self._flushed = 0
        """So many messages are not to wait for a batch to be full."""
        self._closing = self._abandoned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="oona-publisher", daemon=True)
        self._thread.start()

    @property
    def statistics(self) -> PublisherStatistics:
        """What it has done so far."""
        with self._changed:
            return PublisherStatistics(
                len(self._queue), self._bytes, self._published, self._batches, self._blocked,
                self._refused, self._failures, self._last_error, self._rejected,
            )  # fmt: skip

    @property
    def unpublished(self) -> list[OonaMessage]:
        """What waits, oldest first: after a `close` that failed, what is to be published yet."""
        with self._changed:
            return [message for message, _, _ in self._queue]

    def publish(self, message: OonaMessage) -> None:
        """Have a message published soon.

        Raises:
            MessageError: for one that is malformed or too large.
            BusFullError: where too much waits.
            BusError: where it is closed.
        """
        if not isinstance(message, OonaMessage):
            raise MessageError(f"a bus carries OonaMessage, got {type(message).__name__}")
        size = len(message.to_bytes())
        with self._changed:
            if self._has_no_room():
                self._wait_for_room()
            self._check_open()
            self._queue.append((message, size, time.monotonic()))
            self._bytes += size
            self._taken += 1
            count = len(self._queue)
            if count == 1 or count >= self._max_messages or self._bytes >= self._max_bytes:
                self._changed.notify_all()

    def _has_no_room(self) -> bool:
        return len(self._queue) >= self._capacity and not self._closing

    def _wait_for_room(self) -> None:
        waited = 0.0
        if self._when_full == "block":
            self._blocked += 1
            waited = self._timeout
            if self._changed.wait_for(lambda: not self._has_no_room(), waited):
                return
        self._refused += 1
        why = f": {self._last_error}" if self._last_error else ""
        raise BusFullError(
            f"{len(self._queue)} messages wait to be published, which is as many as may, and none"
            f" went in {waited:g} s{why}. Publish less, let more wait, or see to the bus."
        )

    def _check_open(self) -> None:
        if self._closing:
            raise BusError("this publisher was closed; make another one")

    def flush(self, timeout_seconds: float = 30.0) -> None:
        """Return when the broker has taken or rejected all that was published before.

        Raises:
            BusError: where it has not in so many seconds; what waits goes on waiting.
        """
        with self._changed:
            mine = self._flushed = self._taken
            self._changed.notify_all()
            if self._changed.wait_for(lambda: self._gone() >= mine, timeout_seconds):
                return
            left = mine - self._gone()
            why = f": {self._last_error}" if self._last_error else ""
        raise BusError(f"{left} messages were not published within {timeout_seconds:g} s{why}")

    def _gone(self) -> int:
        return self._taken - len(self._queue)

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Flush, and take no more.

        Raises:
            BusError: where not all was published in so many seconds; see `unpublished`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        try:
            self.flush(timeout_seconds)
        finally:
            with self._changed:
                self._abandoned = True
                self._changed.notify_all()
            self._thread.join(timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        pause = _SHORTEST_PAUSE
        at_once = self._max_messages
        split = 0  # so many messages, the oldest, go by fewer at once than a batch may have
        while (batch := self._next(at_once)) is not None:
            count = len(batch)
            try:
                self._broker.publish(batch)
            except EsperError as error:
                if isinstance(error, InputError) and count == 1:
                    # It was looked at when it came; this broker is of another opinion.
                    self._reject(error)
                else:
                    self._fail(error)
                    if count > 1 and isinstance(error, InputError | BusFullError):
                        # One of them is the cause, or fewer find room.
                        at_once = 1 if isinstance(error, InputError) else count // 2
                        split = max(split, count)
                        self._keep_due(split)
                    else:
                        self._rest(pause * random.uniform(0.5, 1.0))
                        pause = min(2 * pause, _LONGEST_PAUSE)
                    continue
            else:
                self._done(count)
            pause = _SHORTEST_PAUSE
            split = max(0, split - count)
            if not split:
                at_once = self._max_messages

    def _keep_due(self, count: int) -> None:
        with self._changed:
            self._flushed = max(self._flushed, self._gone() + count)

    def _reject(self, error: Exception) -> None:
        with self._changed:
            self._bytes -= self._queue.popleft()[1]
            self._rejected += 1
            self._last_error = str(error)
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failures += 1
            self._last_error = str(error)

    def _done(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._bytes -= self._queue.popleft()[1]
            self._published += count
            self._batches += 1
            self._changed.notify_all()

    def _rest(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned, seconds)

    def _next(self, at_once: int) -> list[OonaMessage] | None:
        """The next batch of so many at most, which stays in the queue; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if self._abandoned or not self._queue:
                return None
            until = self._queue[0][2] + self._max_seconds
            self._changed.wait_for(self._is_due, max(0.0, until - time.monotonic()))
            if self._abandoned:
                return None
            batch: list[OonaMessage] = []
            size = 0
            for message, own, _ in self._queue:
                size += own
                if len(batch) == at_once or (batch and size > self._max_bytes):
                    break
                batch.append(message)
            return batch

    def _is_due(self) -> bool:
        return (
            self._closing
            or self._abandoned
            or self._gone() < self._flushed
            or len(self._queue) >= self._max_messages
            or self._bytes >= self._max_bytes
        )

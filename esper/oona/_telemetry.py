"""What training tells others: it never waits for them, and never fails because of them."""

import dataclasses
import json
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from esper.contracts import OonaMessage, Topic
from esper.errors import BusFullError, InputError
from esper.oona._broker import Broker
from esper.oona._bus import Bus, InProcessBus, Subscription

_LONGEST_PAUSE = 2.0
_PAUSE_OF_CLOSING = 0.05

_Entry = tuple[Topic, Mapping[str, Any], float]


class DropReason(StrEnum):
    """Why something was not told."""

    FULL = "too much waited"
    """The oldest goes: the bus is slower than what is published, or away."""
    MALFORMED = "it is no message"
    """Its payload cannot be written as JSON, or is too large."""
    CLOSED = "it was closed before"
    """The bus did not take it in the time that closing was given."""


@dataclasses.dataclass(frozen=True)
class TelemetryStatistics:
    """What was told, what waits, and what was dropped why."""

    published: int
    """Messages that the broker has taken."""
    waiting: int
    dropped: Mapping[DropReason, int]
    """Only reasons that there were."""
    failures: int
    """Calls of the broker that failed and were made again."""
    last_error: str
    """What went wrong last; empty where nothing did."""


class TelemetryBus:
    """A `Bus` for training whose messages go to a broker too, from a thread of its own.

    `publish` appends to a queue and returns: it encodes nothing, waits for nothing and raises
    nothing, whatever the payload and the state of the broker. Those who subscribe here get the
    messages as from an `InProcessBus`. A context manager, which closes it.

    Args:
        broker: where the messages go; it stays open.
        sender_id: who tells.
        key: messages of one topic and key stay in order; by default the sender.
        local: what carries them in this process.
        capacity: messages that wait at most; beyond it the oldest are dropped and counted.
        max_messages: of one call of the broker.
        max_seconds: how long one waits for others to go with.

    Raises:
        InputError: for a limit that cannot be.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        sender_id: str,
        key: str | None = None,
        local: Bus | None = None,
        capacity: int = 65_536,
        max_messages: int = 256,
        max_seconds: float = 0.05,
    ) -> None:
        if capacity < 1 or max_messages < 1 or not max_seconds > 0.0:
            raise InputError(
                "capacity and max_messages are at least 1 and max_seconds more than 0, got"
                f" {capacity!r}, {max_messages!r} and {max_seconds!r}"
            )
        self._broker = broker
        self._sender_id = sender_id
        self._key = sender_id if key is None else key
        # Found wrong here, and not with every message.
        _message(Topic.METRICS, {}, 0.0, self._sender_id, self._key)
        self._local = local or InProcessBus()
        self._tell = self._local.publish
        self._capacity = capacity
        self._max_messages = max_messages
        self._max_seconds = max_seconds
        self._queue: deque[_Entry] = deque()
        self._dropped: dict[DropReason, int] = {}
        # The same thread may come by it twice, in a handler of a signal.
        self._counting = threading.RLock()
        self._published = self._failures = 0
        self._sending: list[OonaMessage] = []
        self._at_once = max_messages
        self._last_error = ""
        self._closing = threading.Event()
        self._until = float("inf")
        self._thread = threading.Thread(target=self._run, name="oona-telemetry", daemon=True)
        self._thread.start()

    def publish(self, topic: Topic, payload: Mapping[str, Any]) -> None:
        """See `Bus.publish`. The payload is read later: it must not be changed any more."""
        self._tell(topic, payload)
        queue = self._queue
        if len(queue) >= self._capacity:
            self._make_room()
        queue.append((topic, payload, time.time()))

    def _make_room(self) -> None:
        with self._counting:
            while len(self._queue) >= self._capacity:
                try:
                    self._queue.popleft()
                except IndexError:  # the thread took them all meanwhile
                    return
                self._drop(DropReason.FULL, 1)

    def _drop(self, reason: DropReason, count: int) -> None:
        with self._counting:
            self._dropped[reason] = self._dropped.get(reason, 0) + count

    def subscribe(self, *topics: Topic, capacity: int = 65_536) -> Subscription:
        """See `Bus.subscribe`: messages of this process."""
        return self._local.subscribe(*topics, capacity=capacity)

    @property
    def statistics(self) -> TelemetryStatistics:
        """What it has done so far."""
        with self._counting:
            return TelemetryStatistics(
                self._published,
                len(self._queue) + len(self._sending),
                dict(self._dropped),
                self._failures,
                self._last_error,
            )

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Send what waits, and drop and count what does not go in so many seconds.

        Never raises. What is published afterwards is dropped when it is closed again, at the
        latest with the process.
        """
        self._until = time.monotonic() + timeout_seconds
        self._closing.set()
        self._thread.join(timeout_seconds + 0.1)
        with self._counting:
            left = len(self._queue) + len(self._sending)
            self._queue.clear()
            self._sending = []
            if left:
                self._drop(DropReason.CLOSED, left)

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
        closing = False
        while not closing:
            # Looked at by the clock, so that who publishes has nobody to wake.
            closing = self._closing.wait(self._max_seconds)
            self._send_all()

    def _send_all(self) -> None:
        pause = self._max_seconds
        while time.monotonic() < self._until:
            if not self._sending:
                if not self._queue:
                    return
                self._sending = self._next()
            if not self._sending or self._send():
                pause = self._max_seconds
                continue
            # Not at one moment with all others who lost it at one moment.
            self._rest(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _rest(self, seconds: float) -> None:
        if self._closing.is_set():
            time.sleep(min(seconds, _PAUSE_OF_CLOSING))
        else:
            self._closing.wait(seconds)

    def _next(self) -> list[OonaMessage]:
        batch: list[OonaMessage] = []
        while len(batch) < self._max_messages:
            try:
                entry = self._queue.popleft()
            except IndexError:
                break
            try:
                batch.append(_message(*entry, self._sender_id, self._key))
            except Exception as error:  # whatever a payload may raise that is no plain data
                self._drop(DropReason.MALFORMED, 1)
                self._last_error = f"{type(error).__name__}: {error}"
        return batch

    def _send(self) -> bool:
        """Publish the batch; whether the broker was there to take it or to refuse it."""
        batch = self._sending
        count = min(self._at_once, len(batch))
        try:
            self._broker.publish(batch[:count])
        except InputError as error:
            self._last_error = str(error)
            if count > 1:
                # One of them is the cause.
                self._at_once = 1
                return True
            self._sent(batch, count, refused=True)
        except Exception as error:
            self._failures += 1
            self._last_error = str(error)
            if count > 1 and isinstance(error, BusFullError):
                # Fewer may find room: the batch may be larger than the stream.
                self._at_once = count // 2
                return True
            return False
        else:
            self._sent(batch, count, refused=False)
        return True

    def _sent(self, batch: list[OonaMessage], count: int, *, refused: bool) -> None:
        with self._counting:
            if self._sending is not batch:  # closing has counted it as dropped meanwhile
                return
            if refused:
                self._drop(DropReason.MALFORMED, count)
            else:
                self._published += count
            self._sending = batch[count:]
            if not self._sending:
                self._at_once = self._max_messages


def _message(
    topic: Topic, payload: Mapping[str, Any], at: float, sender_id: str, key: str
) -> OonaMessage:
    def made(content: Any) -> OonaMessage:
        return OonaMessage(topic=topic, key=key, sender_id=sender_id, sent_at=at, payload=content)

    try:
        return made(payload if isinstance(payload, dict) else dict(payload))
    except ValidationError:
        # Tuples and the like, which are data all the same.
        return made(json.loads(json.dumps(dict(payload), allow_nan=False)))

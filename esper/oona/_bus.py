"""The message bus in one process.

Each subscription has a bounded queue of its own; publishing appends to those
queues and returns, whatever the subscribers do. What a full queue drops is
counted.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from esper.contracts import Topic as Topic


class Message(NamedTuple):
    """One message; `number` counts the publisher's messages from 0."""

    topic: Topic
    number: int
    payload: Mapping[str, Any]


class Subscription:
    """A bounded queue of messages."""

    def __init__(self, topics: frozenset[Topic], capacity: int) -> None:
        self.topics = topics
        self.dropped = 0
        """How many messages a full queue has dropped, oldest first."""
        self._queue: deque[Message] = deque(maxlen=capacity)

    def offer(self, message: Message) -> None:
        """Take a message, dropping the oldest where there is no room."""
        if len(self._queue) == self._queue.maxlen:
            self.dropped += 1
        self._queue.append(message)

    def drain(self) -> list[Message]:
        """All messages waiting, oldest first."""
        waiting: list[Message] = []
        # One at a time, as another thread may add some, or drain it too, at any moment.
        for _ in range(len(self._queue)):
            try:
                waiting.append(self._queue.popleft())
            except IndexError:
                break
        return waiting


class Bus(Protocol):
    """Carries messages from publishers to subscribers."""

    def publish(self, topic: Topic, payload: Mapping[str, Any]) -> None:
        """Hand a message to everyone subscribed; never blocks and never raises."""
        ...

    def subscribe(self, *topics: Topic, capacity: int = 65_536) -> Subscription:
        """A queue of the messages of `topics` from now on."""
        ...


class InProcessBus:
    """A bus whose publishers and subscribers share a process."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._number = 0

    def publish(self, topic: Topic, payload: Mapping[str, Any]) -> None:
        """See `Bus.publish`."""
        message = Message(topic, self._number, payload)
        self._number += 1
        for subscription in self._subscriptions:
            if topic in subscription.topics:
                subscription.offer(message)

    def subscribe(self, *topics: Topic, capacity: int = 65_536) -> Subscription:
        """See `Bus.subscribe`."""
        subscription = Subscription(frozenset(topics), capacity)
        self._subscriptions.append(subscription)
        return subscription

"""What a store of messages is asked for; what all brokers have in common is built on it."""

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol
from zlib import crc32

from esper.contracts import OonaMessage, Topic
from esper.oona._broker import Place, Start
from esper.oona._statistics import BusStatistics

PARTITIONS = 8
"""Of each topic, where nothing else is asked for."""
ALONE = 3
"""From this delivery on a message is delivered alone."""
CAPACITY = 100_000
"""Messages of a topic, and dead letters of it, where nothing else is asked for."""

Slot = tuple[Topic, int]
"""A topic's partition."""


class Record(NamedTuple):
    """A message on its way into the store."""

    topic: Topic
    partition: int
    message_id: str
    """Empty for one that was there before and is to be there again."""
    body: bytes
    message: OonaMessage | None = None
    """What the body says, for a store that can keep it as it is."""


class Taken(NamedTuple):
    """A message on its way out of it."""

    place: Place
    attempt: int
    body: bytes
    message: OonaMessage | None = None


class StoredLetter(NamedTuple):
    """A dead letter as it is stored."""

    number: int
    topic: Topic
    group: str
    reason: str
    attempts: int
    at: float
    body: bytes


class Outcome(StrEnum):
    """What came of a message that was delivered."""

    DONE = "done"
    BACK = "back"
    """Back to be delivered again."""
    DEAD = "dead"
    """Given up, for a reason."""


class Member(NamedTuple):
    """Who joins a group."""

    group: str
    name: str
    token: str
    """Random: two consumers of one name have different ones."""
    topics: tuple[Topic, ...]
    start: Start
    lease_seconds: float
    max_deliveries: int


class Seat(Protocol):
    """A member's place in its group. Its calls but `wait` come one at a time."""

    @property
    def slots(self) -> Collection[Slot]:
        """The partitions that it had when it was last asked for messages."""
        ...

    def take(self, most: int) -> list[Taken]:
        """Messages that are for this member now; see `Consumer.receive`.

        Args:
            most: how many at most; with 0 it sees to its share alone.
        """
        ...

    def settle(self, places: Sequence[Place], outcome: Outcome, reason: str) -> list[Place]:
        """Say what came of messages.

        Returns:
            Those that are another's by now, or were given back, of which nothing was changed. What
            is no longer there counts as settled, and what was given back as given back.
        """
        ...

    def renew(self) -> None:
        """Let the leases begin anew; `take` and `settle` do so when a part of them is over."""
        ...

    def wait(self, seconds: float) -> None:
        """Return when there may be more to take than at the last `take`, or after so long."""
        ...

    def leave(self) -> None:
        """Give up the leases and all that was taken and not settled."""
        ...


class Store(Protocol):
    """Keeps messages, and how far groups have read them. May be called by several threads."""

    @property
    def partitions(self) -> int:
        """Of each topic."""
        ...

    def append(self, records: Sequence[Record]) -> None:
        """See `Broker.publish`."""
        ...

    def join(self, member: Member, held: MutableMapping[Place, int]) -> Seat:
        """See `Broker.consumer`.

        Args:
            held: the places of what the member took and did not settle, with the attempts, kept up
                by the caller. A seat that gets a partition again sets to 0 what is not the
                member's own there any more.
        """
        ...

    def letters(self, topic: Topic | None, limit: int) -> list[StoredLetter]:
        """Dead letters, oldest first."""
        ...

    def redrive(self, letters: Mapping[int, Record]) -> int:
        """Append messages for one group each, and remove the letters of these numbers."""
        ...

    def remove_group(self, group: str) -> None:
        """See `Broker.remove_group`."""
        ...

    def statistics(self) -> BusStatistics:
        """See `Broker.statistics`."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


def partition_of(key: str, partitions: int) -> int:
    """The partition that messages with a key go to; the same in every process, for ever."""
    return crc32(key.encode()) % partitions


EXHAUSTED = "delivered %s and never settled"
"""The reason of a letter that nobody rejected, with how often."""


def exhausted(attempts: int) -> str:
    """The reason of a letter that was delivered so often."""
    return EXHAUSTED % ("once" if attempts == 1 else f"{attempts} times")

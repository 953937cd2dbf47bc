"""What carries messages between processes, and what those who read them hold.

A topic has a number of partitions. A message goes to the one that the hash of its key names, and
stays in order there. In each group of consumers a partition belongs to one consumer at a time, by
a lease, so that what has one key is read in order; whoever has it next first gets what the one
before did not settle.
"""

import dataclasses
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self

from esper.contracts import OonaMessage, Topic
from esper.oona._statistics import BusStatistics

Start = Literal["new", "all"]
"""Where a new group begins: behind what is there, or with the oldest of it."""
Full = Literal["drop", "refuse"]
"""What a full stream does: it drops the oldest and counts it, or raises `BusFullError`."""


class Place(NamedTuple):
    """Where a message lies."""

    topic: Topic
    partition: int
    position: int | str
    """Of a type of the store's own, in the order of the partition."""


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A message in the hands of a consumer, until it is settled by that one."""

    message: OonaMessage
    attempt: int
    """How often it was delivered to its group, this time included."""
    place: Place


@dataclasses.dataclass(frozen=True)
class DeadLetter:
    """A message that a group gave up."""

    number: int
    """Of the letter, on its bus."""
    topic: Topic
    group: str
    reason: str
    attempts: int
    """How often it was delivered."""
    at: float
    """When it was given up: seconds since the epoch, by the clock of the store."""
    body: bytes
    """As it was stored."""
    message: OonaMessage | None
    """None where what is stored cannot be read."""


class Consumer(Protocol):
    """One reader of a group: has a share of the partitions, and what it received of them.

    Its calls renew its leases. One that calls nothing for as long as its lease takes loses what it
    holds to the others of its group. A context manager, which closes it.
    """

    @property
    def name(self) -> str:
        """Its name within the group."""
        ...

    def receive(self, most: int = 64, wait_seconds: float = 0.0) -> list[Delivery]:
        """Messages that are for it now; none after having waited for so long.

        What was not settled comes before what is newer in its partition. A message that comes for
        the third time or more comes alone, and nothing after it before it is settled, so that a
        message that kills its readers takes no others with it.

        Args:
            most: how many at most.

        Raises:
            LeaseLostError: where another consumer was started under this name.
            ServiceUnavailableError: where the store cannot be reached; it may be called again.
            BusError: where the store cannot be used, or the bus or the consumer is closed.
        """
        ...

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """They are done with. Of a message that was settled already nothing is said.

        Raises:
            LeaseLostError: where some went to another consumer meanwhile; the rest is done with.
            ServiceUnavailableError, BusError: as `receive`.
        """
        ...

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """They are to be delivered again, by the order of their partition; errors as above.

        What was delivered `max_deliveries` times becomes a dead letter instead.
        """
        ...

    def reject(self, deliveries: Sequence[Delivery], reason: str) -> None:
        """They become dead letters with this reason; errors as above."""
        ...

    def renew(self) -> None:
        """Hold on to what was received for another lease: for work that takes longer than one.

        May be called by another thread than the one that receives; errors as of `receive`.
        """
        ...

    def close(self) -> None:
        """Leave the group: what is not settled is for the others at once."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Broker(Protocol):
    """Carries messages to groups of consumers, each of which gets every message at least once.

    Where nothing dies and no lease runs out, exactly once. A context manager, which closes it.
    """

    def publish(self, messages: Sequence[OonaMessage]) -> None:
        """Take all of these messages, or none; they are kept as the store promises on return.

        A message whose id its topic's stream still holds is taken to be the same, and is not kept
        twice: after an error whose outcome is not known, publish them again.

        Raises:
            MessageError: for one that is malformed or too large.
            UnknownTopicError: for a topic that there is not.
            BusFullError: where a stream is full and is not to drop what it has.
            ServiceUnavailableError: where the store cannot be reached; they may be there or not.
            BusError: where the store does not take them, or the bus is closed.
        """
        ...

    def consumer(
        self,
        group: str,
        topics: Sequence[Topic | str],
        *,
        name: str | None = None,
        start: Start = "new",
        lease_seconds: float = 30.0,
        max_deliveries: int = 5,
    ) -> Consumer:
        """Join a group, which is made where it is not there; it is kept when all have left.

        Args:
            topics: what to receive.
            name: its name in the group; a random one by default. One who comes under the name of
                another takes its place and has what that one had not settled; the other gets
                `LeaseLostError`.
            start: where a new group begins; one that is there goes on where it was.
            lease_seconds: for how long it may call nothing.
            max_deliveries: after so many a message that was not settled becomes a dead letter.

        Raises:
            UnknownTopicError: for a topic that there is not.
            InputError: for any other argument that cannot be.
            ServiceUnavailableError, BusError: as `publish`.
        """
        ...

    def dead_letters(self, topic: Topic | str | None = None, limit: int = 100) -> list[DeadLetter]:
        """What was given up, oldest first; of all topics by default."""
        ...

    def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """Give letters to their groups again, as new messages that no other group gets.

        Returns:
            How many; those that are no longer there, or cannot be read, are left as they are.
        """
        ...

    def remove_group(self, group: str) -> None:
        """Forget a group, for which streams then keep nothing; no error where there is none."""
        ...

    def statistics(self) -> BusStatistics:
        """How full the streams are, and how far the groups."""
        ...

    def close(self) -> None:
        """Close its consumers and let go of the store; nothing that was published is lost."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

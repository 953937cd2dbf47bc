"""What all brokers have in common: everything but where messages are kept."""

import contextlib
import threading
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Self, get_args
from weakref import WeakSet

from esper.contracts import LONGEST_LEASE_SECONDS, OonaMessage, Topic, topic_of
from esper.errors import BusError, EsperError, InputError, MessageError
from esper.oona._broker import Consumer, DeadLetter, Full, Start
from esper.oona._statistics import BusStatistics
from esper.oona._store import Member, Record, Store, StoredLetter, partition_of
from esper.oona._stored_consumer import StoredConsumer, decode

_MOST_NAME = 200


class StoredBroker:
    """A `Broker` over a store; each kind of store has one of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._consumers: WeakSet[StoredConsumer] = WeakSet()
        self._lock = threading.Lock()
        self._closed = False

    def publish(self, messages: Sequence[OonaMessage]) -> None:
        """See `Broker.publish`."""
        self._check_open("publish")
        partitions = self._store.partitions
        records = [_record(message, partitions) for message in messages]
        if records:
            self._store.append(records)

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
        """See `Broker.consumer`."""
        self._check_open("join a group")
        token = uuid.uuid4().hex
        wanted = _topics(topics)
        if start not in get_args(Start):
            raise InputError(
                f"a group starts with 'new' messages or with 'all' that are there, not {start!r}"
            )
        if not 0.0 < lease_seconds <= LONGEST_LEASE_SECONDS:
            raise InputError(
                f"lease_seconds is more than 0 and at most {LONGEST_LEASE_SECONDS:g},"
                f" got {lease_seconds!r}"
            )
        if max_deliveries < 1:
            raise InputError(f"max_deliveries is at least 1, got {max_deliveries!r}")
        member = Member(
            _name("group", group),
            f"consumer-{token[:12]}" if name is None else _name("name", name),
            token,
            wanted,
            start,
            float(lease_seconds),
            max_deliveries,
        )
        consumer = StoredConsumer(self._store, member)
        with self._lock:
            self._consumers.add(consumer)
        return consumer

    def dead_letters(self, topic: Topic | str | None = None, limit: int = 100) -> list[DeadLetter]:
        """See `Broker.dead_letters`."""
        self._check_open("read dead letters")
        if limit < 0:
            raise InputError(f"limit is at least 0, got {limit!r}")
        wanted = None if topic is None else topic_of(topic)
        return [_letter(stored) for stored in self._store.letters(wanted, limit)]

    def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """See `Broker.redrive`."""
        self._check_open("redrive dead letters")
        partitions = self._store.partitions
        again = {
            letter.number: Record(
                letter.topic, partition_of(letter.message.key, partitions), "", letter.body
            )
            for letter in letters
            if letter.message is not None
        }
        return self._store.redrive(again) if again else 0

    def remove_group(self, group: str) -> None:
        """See `Broker.remove_group`."""
        self._check_open("remove a group")
        self._store.remove_group(_name("group", group))

    def statistics(self) -> BusStatistics:
        """See `Broker.statistics`."""
        self._check_open("read statistics")
        return self._store.statistics()

    def close(self) -> None:
        """See `Broker.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            consumers = list(self._consumers)
        for consumer in consumers:
            # A store that is gone has no seats to give up: their leases run out.
            with contextlib.suppress(EsperError):
                consumer.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise BusError(f"cannot {what}: this bus was closed; open another one")


def check_limits(capacity: int, full: Full, partitions: int | None) -> None:
    """Check what all stores are given.

    Raises:
        InputError: naming what is expected.
    """
    if capacity < 1:
        raise InputError(f"capacity is at least 1 message, got {capacity!r}")
    if full not in get_args(Full):
        raise InputError(f"a full stream is to 'drop' the oldest or to 'refuse', not {full!r}")
    if partitions is not None and not 1 <= partitions <= 256:
        raise InputError(f"a topic has from 1 to 256 partitions, got {partitions!r}")


def check_partitions(where: str, there: int, asked: int | None) -> None:
    """Check that a store that exists has as many partitions as are asked for.

    Raises:
        InputError: with both numbers.
    """
    if asked is not None and asked != there:
        raise InputError(
            f"the topics of {where} have {there} partitions each, and not {asked}: what they hold"
            " is in order by these. Leave the number out, or begin another bus."
        )


def _topics(topics: Sequence[Topic | str]) -> tuple[Topic, ...]:
    if isinstance(topics, str):
        raise InputError(f"topics is a list, got the text {topics!r}: put it in brackets")
    wanted = tuple(dict.fromkeys(topic_of(topic) for topic in topics))
    if not wanted:
        raise InputError("a consumer receives at least one topic, got an empty list")
    return wanted


def _name(what: str, value: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _MOST_NAME:
        raise InputError(
            f"{what} is a printable text of 1 to {_MOST_NAME} characters, got {value!r:.80}"
        )
    return value


def _record(message: OonaMessage, partitions: int) -> Record:
    if not isinstance(message, OonaMessage):
        raise MessageError(
            f"a bus carries OonaMessage, got {type(message).__name__}:"
            " make one with topic, sender_id and payload"
        )
    topic, body = topic_of(message.topic), message.to_bytes()
    return Record(topic, partition_of(message.key, partitions), message.message_id, body, message)


def _letter(stored: StoredLetter) -> DeadLetter:
    message, _ = decode(stored.body, stored.topic)
    return DeadLetter(
        stored.number,
        stored.topic,
        stored.group,
        stored.reason,
        stored.attempts,
        stored.at,
        stored.body,
        message,
    )

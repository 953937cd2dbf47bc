"""Each kind of broker, with a clock that a test sets and a way to damage what is stored."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import redis

from esper.contracts import OonaMessage, Topic
from esper.oona import Broker, Delivery, MemoryBroker, SqliteBroker
from esper.oona._redis import RedisBroker
from esper.oona._sqlite_streams import places_of
from esper.oona._store import Record, partition_of

TOPIC = Topic.METRICS


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Kind(Protocol):
    """One store, that any number of brokers may be opened on."""

    clock: Clock

    def open(self, **options: Any) -> Broker:
        """A broker on the store; a test closes it or leaves that to `close`."""
        ...

    def spoil(self, broker: Broker, topic: Topic, key: str, body: bytes) -> None:
        """Put something into the store that no publisher would."""
        ...

    def close(self) -> None: ...


class MemoryKind:
    def __init__(self) -> None:
        self.clock = Clock()
        self._broker: MemoryBroker | None = None

    def open(self, **options: Any) -> MemoryBroker:
        # There is one for all.
        if self._broker is None:
            self._broker = MemoryBroker(clock=self.clock, **options)
        return self._broker

    def spoil(self, broker: Broker, topic: Topic, key: str, body: bytes) -> None:
        assert isinstance(broker, MemoryBroker)
        partition = partition_of(key, broker._store.partitions)
        broker._store.append([Record(topic, partition, "f" * 32, body)])

    def close(self) -> None:
        if self._broker is not None:
            self._broker.close()


class SqliteKind:
    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self._path = path
        self._open: list[SqliteBroker] = []

    def open(self, **options: Any) -> SqliteBroker:
        broker = SqliteBroker(self._path, clock=self.clock, **options)
        self._open.append(broker)
        return broker

    def spoil(self, broker: Broker, topic: Topic, key: str, body: bytes) -> None:
        # As another program would that writes to the file.
        with closing(sqlite3.connect(self._path)) as other, other:
            query = "SELECT number FROM topics WHERE topic = ?"
            (number,) = other.execute(query, (topic,)).fetchone()
            query = "SELECT value FROM settings WHERE name = 'partitions'"
            (partitions,) = other.execute(query).fetchone()
            first, _ = places_of(number * partitions + partition_of(key, partitions))
            query = "UPDATE topics SET length = length + 1, last = last + 1"
            query += " WHERE number = ? RETURNING last"
            ((last,),) = other.execute(query, (number,)).fetchall()
            query = "INSERT INTO messages (position, body) VALUES (?, ?)"
            other.execute(query, (first + last, body))

    def close(self) -> None:
        for broker in self._open:
            broker.close()


class RedisKind:
    def __init__(self, url: str, name: str = "esper") -> None:
        self.clock = Clock()
        self._url = url
        self._name = name
        self._open: list[RedisBroker] = []

    def open(self, **options: Any) -> RedisBroker:
        broker = RedisBroker(self._url, name=self._name, clock=self.clock, **options)
        self._open.append(broker)
        return broker

    def spoil(self, broker: Broker, topic: Topic, key: str, body: bytes) -> None:
        # As another program would that writes to the server.
        with redis.Redis.from_url(self._url) as client:
            partitions = int(client.hget("esper:settings", "partitions"))
            stream = f"esper:{topic.value}:p{partition_of(key, partitions)}"
            client.xadd(stream, {"b": body})
            client.hincrby(f"esper:{topic.value}:meta", "length", 1)

    def close(self) -> None:
        for broker in self._open:
            broker.close()


def message(value: Any, key: str = "", topic: Topic = TOPIC, **fields: Any) -> OonaMessage:
    return OonaMessage(topic=topic, key=key, sender_id="test", payload={"value": value}, **fields)


def messages(count: int, keys: int = 1, first: int = 0) -> list[OonaMessage]:
    """Numbered messages, by turns of so many keys."""
    return [message(i, f"key-{i % keys}") for i in range(first, first + count)]


def values(deliveries: list[Delivery]) -> list[Any]:
    return [each.message.payload["value"] for each in deliveries]

"""A broker on a Redis server: for any number of processes of any number of machines."""

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import redis

from esper.contracts import Topic
from esper.errors import InputError
from esper.oona._broker import Full, Place
from esper.oona._full import full_stream
from esper.oona._redis_seat import RedisSeat
from esper.oona._redis_server import Server
from esper.oona._statistics import BusStatistics, GroupStatistics, TopicStatistics
from esper.oona._store import CAPACITY, PARTITIONS, Member, Record, StoredLetter
from esper.oona._stored import StoredBroker, check_limits, check_partitions


class RedisBroker(StoredBroker):
    """A `Broker` on the streams of a Redis server, version 7 or newer, that is no cluster.

    What was published outlives the clients. It outlives the server as its own configuration says:
    with `appendonly yes` and `appendfsync always` all of it does; with `everysec` what is older
    than a second or two. Times are the server's.

    Args:
        url: `redis://[USER:PASSWORD@]HOST:PORT/NUMBER`, or `rediss://…` over TLS.
        name: of the bus; a server may have several.
        capacity: messages that a topic holds at most.
        full: what a topic does that holds so many of which some group has not acknowledged one, or
            for which the server has no memory.
        partitions: of each topic: how many consumers of a group can share it. 8 by default.
        timeout_seconds: how long one answer may take.
        patience_seconds: for how long a call is made again while the server cannot be reached.
        opening_seconds: the same of opening the bus; `patience_seconds` by default.
        clock: seconds by which leases run out, the same for all clients; the server's by default.

    Raises:
        InputError: for what cannot be asked for, or a server that is too old.
        SchemaVersionError: for a bus that a newer version of Esper made.
        ServiceUnavailableError: where the server cannot be reached.
        AccessDeniedError: where it does not let this client in.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "esper",
        capacity: int = CAPACITY,
        full: Full = "drop",
        partitions: int | None = None,
        timeout_seconds: float = 5.0,
        patience_seconds: float = 10.0,
        opening_seconds: float | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        check_limits(capacity, full, partitions)
        opening = patience_seconds if opening_seconds is None else opening_seconds
        if not (timeout_seconds > 0.0 and patience_seconds >= 0.0 and opening >= 0.0):
            raise InputError(
                "timeout_seconds is more than 0, patience_seconds and opening_seconds at least 0,"
                f" got {timeout_seconds!r}, {patience_seconds!r} and {opening!r}"
            )
        server = Server(url, name, timeout_seconds, patience_seconds)
        try:
            there = server.open(partitions or PARTITIONS, opening)
            check_partitions(f"the bus {name!r} on {server.where}", there, partitions)
        except BaseException:
            server.close()
            raise
        super().__init__(RedisStore(server, name, there, capacity, full, clock))


class RedisStore:
    """A `Store` on a Redis server."""

    def __init__(
        self,
        server: Server,
        name: str,
        partitions: int,
        capacity: int,
        full: Full,
        clock: Callable[[], float] | None,
    ) -> None:
        self.partitions = partitions
        self._server = server
        self._name = name
        self._capacity = capacity
        self._full: Full = full
        self._clock = clock

    def append(self, records: Sequence[Record]) -> None:
        """See `Store.append`."""
        values = [
            value
            for topic, partition, message_id, body, _ in records
            for value in (topic.value, partition, message_id, body)
        ]
        self._add("publish", {record.topic for record in records}, values)

    def _add(self, script: str, topics: Collection[Topic], values: Sequence[Any]) -> list[Any]:
        answer = self._server.patiently(lambda: self._add_once(script, topics, values))
        if answer[0] == b"FULL":
            _, topic, length, count = answer
            raise full_stream(Topic(topic.decode()), int(length), int(count), self._capacity)
        return answer

    def _add_once(self, script: str, topics: Collection[Topic], values: Sequence[Any]) -> Any:
        while True:
            try:
                return self._server.run_once(script, self._capacity, self._full, *values)
            except redis.OutOfMemoryError:
                # Memory comes back by blocks of messages, so that it may take some calls.
                if not self._server.run_once("free", self._full, *sorted(topics)):
                    raise

    def join(self, member: Member, held: MutableMapping[Place, int]) -> RedisSeat:
        """See `Store.join`."""
        seat = RedisSeat(self._server, self._name, member, held, self._capacity, self._clock)
        seat.join()
        return seat

    def letters(self, topic: Topic | None, limit: int) -> list[StoredLetter]:
        """See `Store.letters`."""
        # Not those of topics that only a newer version knows, which may use this bus too.
        topics = Topic if topic is None else (topic,)
        rows = self._server.run("letters", limit, *(each.value for each in topics))
        return [
            StoredLetter(
                int(number), Topic(own.decode()), group.decode(), reason.decode(), int(attempts),
                float(at), body,
            )
            for number, own, group, reason, attempts, at, body in rows
        ]  # fmt: skip

    def redrive(self, letters: Mapping[int, Record]) -> int:
        """See `Store.redrive`."""
        values = [
            value
            for number, record in letters.items()
            for value in (number, record.topic.value, record.partition, record.body)
        ]
        topics = {record.topic for record in letters.values()}
        return int(self._add("redrive", topics, values)[1])

    def remove_group(self, group: str) -> None:
        """See `Store.remove_group`."""
        self._server.run("forget", group)

    def statistics(self) -> BusStatistics:
        """See `Store.statistics`."""
        now = "" if self._clock is None else repr(1e3 * self._clock())
        topics: list[TopicStatistics] = []
        groups: list[GroupStatistics] = []
        known = {topic.value.encode(): topic for topic in Topic}
        for name, length, dropped, dead, own in self._server.run("statistics", now):
            topic = known.get(name)
            if topic is None:  # of a newer version, which may use this bus too
                continue
            topics.append(TopicStatistics(topic, length, dropped, dead))
            groups += [GroupStatistics(group.decode(), topic, *counts) for group, *counts in own]
        return BusStatistics(tuple(topics), tuple(groups))

    def close(self) -> None:
        """See `Store.close`."""
        self._server.close()

"""A broker in this process: what it holds is gone with it."""

import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from esper.contracts import Topic
from esper.oona._broker import Full, Place
from esper.oona._full import full_stream
from esper.oona._memory_stream import Cursor, Dead, Reading, Stream
from esper.oona._shares import Lease, Shares, share, soonest
from esper.oona._statistics import BusStatistics, GroupStatistics, TopicStatistics
from esper.oona._store import (
    ALONE,
    CAPACITY,
    PARTITIONS,
    Member,
    Outcome,
    Record,
    Slot,
    StoredLetter,
    Taken,
    exhausted,
)
from esper.oona._stored import StoredBroker, check_limits
from esper.oona._stored_consumer import replaced


class MemoryBroker(StoredBroker):
    """A `Broker` for the threads of one process, which takes no server and no file.

    Args:
        capacity: messages that a topic holds at most.
        full: what a topic does that holds so many of which some group has not acknowledged one.
        partitions: of each topic: how many consumers of a group can share it. 8 by default.
        clock: seconds, by which leases run out.
    """

    def __init__(
        self,
        *,
        capacity: int = CAPACITY,
        full: Full = "drop",
        partitions: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_limits(capacity, full, partitions)
        super().__init__(MemoryStore(capacity, full, partitions or PARTITIONS, clock))


class MemoryStore:
    """A `Store` of this process."""

    def __init__(
        self, capacity: int, full: Full, partitions: int, clock: Callable[[], float]
    ) -> None:
        self.partitions = partitions
        self.clock = clock
        self.changed = threading.Condition()
        """Its lock guards everything here; waited for by those who have nothing to take."""
        self.streams: dict[Topic, Stream] = {}
        self._capacity = capacity
        self._full: Full = full
        self.changes = 0
        """Counts whatever may be a reason to share out the partitions anew."""
        self._number = 0

    def stream(self, topic: Topic) -> Stream:
        """The stream of a topic, which begins when it is first asked for."""
        if topic not in self.streams:
            self.streams[topic] = Stream(self.partitions)
        return self.streams[topic]

    def append(self, records: Sequence[Record]) -> None:
        """See `Store.append`."""
        with self.changed:
            new: dict[Topic, dict[str, Record]] = {}
            for record in records:
                if record.message_id not in self.stream(record.topic).ids:
                    new.setdefault(record.topic, {}).setdefault(record.message_id, record)
            if self._full == "refuse":
                for topic, own in new.items():
                    self._make_room(topic, len(own))
            for topic, own in new.items():
                stream = self.streams[topic]
                for record in own.values():
                    stream.append(record)
                stream.trim(self._capacity)
            if new:
                self.changed.notify_all()

    def _make_room(self, topic: Topic, count: int) -> None:
        stream = self.streams[topic]
        if stream.length + count > self._capacity:
            stream.free_acknowledged()
        if stream.length + count > self._capacity:
            raise full_stream(topic, stream.length, count, self._capacity)

    def changed_hands(self) -> None:
        """Tell all members that they are to look at their shares again."""
        self.changes += 1
        self.changed.notify_all()

    def join(self, member: Member, held: MutableMapping[Place, int]) -> "MemorySeat":
        """See `Store.join`."""
        with self.changed:
            for topic in member.topics:
                stream = self.stream(topic)
                reading = stream.reading(member.group, member.start)
                before = reading.members.get(member.name)
                if before is not None:
                    reading.let_go(before.token)
                until = self.clock() + member.lease_seconds
                reading.members[member.name] = Lease(member.token, until, member.lease_seconds)
            self.changed_hands()
        return MemorySeat(self, member, held)

    def bury(self, reading: Reading, topic: Topic, cursor: Cursor, place: int, reason: str) -> None:
        """Make a message that a group has pending a dead letter."""
        attempts, _ = cursor.pending.pop(place)
        entry = cursor.partition.entries.get(place)
        if entry is None:
            return
        self._number += 1
        stream = self.streams[topic]
        dead = Dead(topic, reading.group, reason, attempts, time.time(), entry.body)
        stream.letters[self._number] = dead
        if len(stream.letters) > self._capacity:
            del stream.letters[next(iter(stream.letters))]
            stream.dropped += 1

    def letters(self, topic: Topic | None, limit: int) -> list[StoredLetter]:
        """See `Store.letters`."""
        with self.changed:
            found = [
                StoredLetter(number, *dead)
                for own, stream in self.streams.items()
                if topic in (None, own)
                for number, dead in stream.letters.items()
            ]
        return sorted(found)[:limit]

    def redrive(self, letters: Mapping[int, Record]) -> int:
        """See `Store.redrive`."""
        with self.changed:
            there = {
                number: record
                for number, record in letters.items()
                if number in self.stream(record.topic).letters
            }
            if self._full == "refuse":
                for topic in {record.topic for record in there.values()}:
                    count = sum(record.topic == topic for record in there.values())
                    self._make_room(topic, count)
            for number, record in there.items():
                stream = self.streams[record.topic]
                dead = stream.letters.pop(number)
                stream.append(record, dead.group)
                stream.trim(self._capacity)
            self.changed.notify_all()
            return len(there)

    def remove_group(self, group: str) -> None:
        """See `Store.remove_group`."""
        with self.changed:
            for stream in self.streams.values():
                stream.readings.pop(group, None)
            self.changed_hands()

    def statistics(self) -> BusStatistics:
        """See `Store.statistics`."""
        with self.changed:
            now = self.clock()
            topics = [
                TopicStatistics(topic, stream.length, stream.dropped, len(stream.letters))
                for topic, stream in sorted(self.streams.items())
            ]
            groups = [
                GroupStatistics(
                    group,
                    topic,
                    sum(cursor.lag(group) for cursor in reading.cursors),
                    sum(len(cursor.pending) for cursor in reading.cursors),
                    len(reading.alive(now)),
                )
                for topic, stream in sorted(self.streams.items())
                for group, reading in sorted(stream.readings.items())
            ]
        return BusStatistics(tuple(topics), tuple(groups))

    def close(self) -> None:
        """See `Store.close`."""
        with self.changed:
            self.changed.notify_all()


class MemorySeat:
    """A `Seat` in a group of this process."""

    def __init__(
        self, store: MemoryStore, member: Member, held: MutableMapping[Place, int]
    ) -> None:
        self.slots: frozenset[Slot] = frozenset()
        self._store = store
        self._member = member
        self._held = held
        self._readable: list[Slot] = []
        self._turn = 0
        self._sat = 0.0
        self._until = 0.0
        """When it has to look at its shares again: to renew, or because another's lease is over."""
        self._seen = -1

    def take(self, most: int) -> list[Taken]:
        """See `Seat.take`."""
        with self._store.changed:
            self._sit()
            found: list[Taken] = []
            # Each partition is the first one in turn.
            self._turn += 1
            first = self._turn % max(1, len(self._readable))
            for topic, partition in self._readable[first:] + self._readable[:first]:
                if self._take(topic, partition, most, found):
                    break
            return found

    def _take(self, topic: Topic, partition: int, most: int, found: list[Taken]) -> bool:
        """Add what one partition has; whether this is all for now."""
        member = self._member
        reading = self._store.streams[topic].readings[member.group]
        cursor = reading.cursors[partition]
        for place in cursor.returned(member.token):
            if len(found) == most:
                return True
            attempts = cursor.pending[place][0]
            if place not in cursor.partition.entries:
                del cursor.pending[place]
            elif attempts >= member.max_deliveries:
                self._store.bury(reading, topic, cursor, place, exhausted(attempts))
            else:
                alone = attempts + 1 >= ALONE
                if found and alone:
                    return False
                found.append(cursor.deliver(topic, partition, place, member.token))
                if alone:
                    return True
        while (place := cursor.next_for(member.group)) is not None:
            if len(found) == most:
                return True
            found.append(cursor.deliver(topic, partition, place, member.token))
        return len(found) == most

    def _sit(self, *, anew: bool = False) -> None:
        """Renew what it has, and see to its share, where it is time to or things have changed."""
        store, now = self._store, self._store.clock()
        early = self._sat <= now < self._until
        if early and self._seen == store.changes and not anew:
            return
        member, settled, readable = self._member, True, list[Slot]()
        lease = Lease(member.token, now + member.lease_seconds, member.lease_seconds)
        slots: set[Slot] = set()
        self._until = now + member.lease_seconds / 4
        for topic in member.topics:
            shares = self._share(topic, lease, now)
            settled = settled and shares.settled
            mine = sorted(shares.keep | shares.take)
            readable += [(topic, partition) for partition in mine]
            slots |= {(topic, partition) for partition in (*mine, *shares.drain)}
        self._readable, self.slots = readable, frozenset(slots)
        self._sat, self._seen = now, store.changes if settled else -1

    def _share(self, topic: Topic, lease: Lease, now: float) -> Shares:
        member, store = self._member, self._store
        reading = store.stream(topic).reading(member.group, "all")
        own = reading.members.get(member.name)
        if own is not None and own.token != member.token:
            raise replaced(member)
        reading.members[member.name] = lease
        for name in reading.members.keys() - reading.alive(now):
            del reading.members[name]
        leases = {p: c.lease for p, c in enumerate(reading.cursors) if c.lease is not None}
        shares = share(
            member.token,
            leases,
            store.partitions,
            {each.token for each in reading.members.values()},
            {
                place.partition
                for place, attempt in self._held.items()
                if attempt and place.topic == topic
            },
            now,
        )
        self._until = soonest(self._until, member.token, leases.values(), reading.members.values())
        for partition in shares.keep | shares.drain | shares.take:
            cursor = reading.cursors[partition]
            if cursor.lease is None or cursor.lease.token != member.token:
                cursor.moved = True
                self._forget(topic, partition, cursor)
            cursor.lease = lease
        for partition in shares.free:
            reading.cursors[partition].lease = None
        if shares.free:
            store.changed_hands()
        return shares

    def _forget(self, topic: Topic, partition: int, cursor: Cursor) -> None:
        """Note what is another's by now, or done with, of a partition that it gets again."""
        for place in self._held:
            if (place.topic, place.partition) == (topic, partition):
                _, token = cursor.pending.get(int(place.position), (0, ""))
                if token != self._member.token:
                    self._held[place] = 0

    def settle(self, places: Sequence[Place], outcome: Outcome, reason: str) -> list[Place]:
        """See `Seat.settle`."""
        lost: list[Place] = []
        with self._store.changed:
            self._sit()
            for place in places:
                stream = self._store.stream(place.topic)
                reading = stream.readings.get(self._member.group)
                if reading is None:
                    continue
                cursor, position = reading.cursors[place.partition], int(place.position)
                pending = cursor.pending.get(position)
                if pending is None or (pending[1] == "" and outcome is Outcome.BACK):
                    continue
                if pending[1] != self._member.token:
                    lost.append(place)
                elif outcome is Outcome.DONE:
                    del cursor.pending[position]
                elif outcome is Outcome.BACK:
                    cursor.give_back(position)
                else:
                    self._store.bury(reading, place.topic, cursor, position, reason)
            if outcome is Outcome.BACK:
                self._store.changed.notify_all()
        return lost

    def renew(self) -> None:
        """See `Seat.renew`."""
        with self._store.changed:
            self._sit(anew=True)

    def wait(self, seconds: float) -> None:
        """See `Seat.wait`."""
        with self._store.changed:
            if self._seen == self._store.changes and not self._any():
                self._store.changed.wait(seconds)

    def _any(self) -> bool:
        group = self._member.group
        for topic, partition in self._readable:
            reading = self._store.stream(topic).readings.get(group)
            if reading is None or reading.cursors[partition].has_more:
                return True
        return False

    def leave(self) -> None:
        """See `Seat.leave`."""
        member = self._member
        with self._store.changed:
            for topic in member.topics:
                reading = self._store.stream(topic).readings.get(member.group)
                if reading is None:
                    continue
                own = reading.members.get(member.name)
                if own is not None and own.token == member.token:
                    del reading.members[member.name]
                reading.let_go(member.token)
            self._store.changed_hands()

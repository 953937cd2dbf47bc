"""The messages of all topics in a file: how they come in, and what goes where there is no room."""

import heapq
import sqlite3
from collections.abc import Mapping, Sequence
from itertools import islice

from esper.contracts import Topic
from esper.errors import BusFullError
from esper.oona._broker import Full
from esper.oona._full import full_stream
from esper.oona._store import Record

_FREED_AT_ONCE = 1_000
"""Acknowledged messages of a partition that are removed beyond what is needed, so that it is not
done for each message and takes long for none."""

_NUMBER_BITS = 40
_LARGEST_NUMBER = (1 << _NUMBER_BITS) - 1

Row = tuple[int, str | None, str | None, bytes]
"""Slot, the only group, the id, and the body."""


def places_of(slot: int) -> tuple[int, int]:
    """The first and the last position of a slot; no message has the first one."""
    return slot << _NUMBER_BITS, (slot << _NUMBER_BITS) + _LARGEST_NUMBER


def topic_number(connection: sqlite3.Connection, topic: Topic) -> int:
    """The number of a topic, which gets one when it is first asked for, within a transaction."""
    query = "SELECT number FROM topics WHERE topic = ?"
    row = connection.execute(query, (topic.value,)).fetchone()
    if row is None:
        connection.execute("INSERT INTO topics (topic) VALUES (?)", (topic.value,))
        row = connection.execute(query, (topic.value,)).fetchone()
    return row[0]


class Streams:
    """What a topic may hold, and what happens then; all calls are within a transaction.

    Args:
        capacity: messages of a topic, and dead letters of it.
        full: what to do beyond it.
    """

    def __init__(self, capacity: int, full: Full) -> None:
        self._capacity = capacity
        self._full: Full = full

    def append(
        self, connection: sqlite3.Connection, partitions: int, batch: Sequence[Record]
    ) -> BusFullError | None:
        """Append messages, or say why none of them could be."""
        rows: dict[int, list[Row]] = {}
        topics: dict[int, Topic] = {}
        numbers: dict[Topic, int] = {}
        for topic, partition, message_id, body, _ in batch:
            number = numbers.get(topic)
            if number is None:
                number = numbers[topic] = topic_number(connection, topic)
                topics[number], rows[number] = topic, []
            # An id is one of its topic.
            key = f"{message_id}.{number}"
            rows[number].append((number * partitions + partition, None, key, body))
        return self._append(connection, partitions, topics, rows)

    def _append(
        self,
        connection: sqlite3.Connection,
        partitions: int,
        topics: Mapping[int, Topic],
        rows: Mapping[int, Sequence[Row]],
    ) -> BusFullError | None:
        refusing = self._full == "refuse"
        if refusing:
            connection.execute("SAVEPOINT batch")
        refused = None
        for number, own in rows.items():
            (last,) = connection.execute(
                "SELECT last FROM topics WHERE number = ?", (number,)
            ).fetchone()
            first = last + 1
            added = connection.executemany(
                "INSERT OR IGNORE INTO messages (position, only, id, body) VALUES (?, ?, ?, ?)",
                [(places_of(slot)[0] + first + i, *rest) for i, (slot, *rest) in enumerate(own)],
            ).rowcount
            if not added:
                continue
            ((length,),) = connection.execute(
                "UPDATE topics SET last = last + ?, length = length + ? WHERE number = ?"
                " RETURNING length",
                (len(own), added, number),
            ).fetchall()
            if length > self._capacity:
                length -= self._free_acknowledged(connection, partitions, number, length)
            if length > self._capacity and refusing:
                was = length - added
                refused = full_stream(topics[number], was, added, self._capacity)
                break
            if length > self._capacity:
                self._drop(connection, partitions, number, length - self._capacity)
        if refused is not None:
            connection.execute("ROLLBACK TO batch")
        if refusing:
            connection.execute("RELEASE batch")
        return refused

    def _free_acknowledged(
        self, connection: sqlite3.Connection, partitions: int, number: int, length: int
    ) -> int:
        """Remove what all groups have acknowledged, as far as needed; how many that were."""
        slots = range(number * partitions, (number + 1) * partitions)
        most = length - self._capacity + _FREED_AT_ONCE
        freed = 0
        for slot, settled in _settled(connection, slots).items():
            freed += connection.execute(
                "DELETE FROM messages WHERE position IN (SELECT position FROM messages"
                " WHERE position BETWEEN ? AND ? ORDER BY position LIMIT ?)",
                (places_of(slot)[0], settled, most),
            ).rowcount
        connection.execute(
            "UPDATE topics SET length = length - ? WHERE number = ?", (freed, number)
        )
        return freed

    def _drop(
        self, connection: sqlite3.Connection, partitions: int, number: int, count: int
    ) -> None:
        """Remove the oldest, read or not."""
        slots = range(number * partitions, (number + 1) * partitions)
        query = "SELECT position FROM messages WHERE position BETWEEN ? AND ? ORDER BY position"
        found = [
            connection.execute(f"{query} LIMIT ?", (*places_of(slot), count)).fetchall()
            for slot in slots
        ]
        oldest = heapq.merge(*found, key=lambda row: row[0] & _LARGEST_NUMBER)
        going = list(islice(oldest, count))
        connection.executemany("DELETE FROM messages WHERE position = ?", going)
        groups = connection.execute(
            "SELECT DISTINCT grp FROM cursors WHERE slot = ?", (slots[0],)
        ).fetchall()
        connection.executemany(
            "DELETE FROM pending WHERE grp = ? AND position = ?",
            [(group, position) for (position,) in going for (group,) in groups],
        )
        connection.execute(
            "UPDATE topics SET length = length - ?1, dropped = dropped + ?1 WHERE number = ?2",
            (len(going), number),
        )

    def redrive(
        self, connection: sqlite3.Connection, partitions: int, letters: Mapping[int, Record]
    ) -> int:
        """Append letters again for their groups, and remove them; how many.

        Raises:
            BusFullError: where there is no room; nothing is changed then.
        """
        rows: dict[int, list[Row]] = {}
        topics: dict[int, Topic] = {}
        for letter, record in letters.items():
            found = connection.execute(
                "DELETE FROM letters WHERE letter = ? RETURNING number, grp", (letter,)
            ).fetchall()
            for number, group in found:
                topics[number] = record.topic
                slot = number * partitions + record.partition
                rows.setdefault(number, []).append((slot, group, None, record.body))
        refused = self._append(connection, partitions, topics, rows)
        if refused is not None:
            raise refused
        return sum(map(len, rows.values()))

    def bury(
        self,
        connection: sqlite3.Connection,
        number: int,
        group: str,
        reason: str,
        attempts: int,
        at: float,
        body: bytes,
    ) -> None:
        """Keep a dead letter; the oldest of its topic goes where there are too many."""
        connection.execute(
            "INSERT INTO letters (number, grp, reason, attempts, at, body)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (number, group, reason, attempts, at, body),
        )
        gone = connection.execute(
            "DELETE FROM letters WHERE letter IN (SELECT letter FROM letters WHERE number = ?"
            " ORDER BY letter DESC LIMIT -1 OFFSET ?)",
            (number, self._capacity),
        ).rowcount
        if gone:
            connection.execute(
                "UPDATE topics SET dropped = dropped + ? WHERE number = ?", (gone, number)
            )


def _settled(connection: sqlite3.Connection, slots: range) -> dict[int, int]:
    """For each slot up to where all groups have acknowledged; no slot where there is no group."""
    found: dict[int, int] = {}
    rows = connection.execute(
        "SELECT grp, slot, position FROM cursors WHERE slot BETWEEN ? AND ?", (slots[0], slots[-1])
    ).fetchall()
    for group, slot, position in rows:
        (first,) = connection.execute(
            "SELECT min(position) FROM pending WHERE grp = ? AND position BETWEEN ? AND ?",
            (group, *places_of(slot)),
        ).fetchone()
        until = position if first is None else first - 1
        found[slot] = min(until, found.get(slot, until))
    return found

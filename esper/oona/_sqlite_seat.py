"""A member of a group that reads a file."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager

from esper.contracts import Topic
from esper.oona._broker import Place
from esper.oona._sqlite_database import Database, patiently, writing
from esper.oona._sqlite_group import Sitting, changes, leave, sit
from esper.oona._sqlite_streams import Streams, places_of
from esper.oona._store import ALONE, Member, Outcome, Slot, Taken, exhausted

_SHORTEST_PAUSE = 2e-4
_LONGEST_PAUSE = 5e-3
"""Seconds between two looks of one who waits."""


class SqliteSeat:
    """A `Seat` in a group of a file, with a connection of its own."""

    def __init__(
        self,
        database: Database,
        connection: sqlite3.Connection,
        turn: threading.Lock,
        streams: Streams,
        member: Member,
        held: MutableMapping[Place, int],
        clock: Callable[[], float],
    ) -> None:
        self.slots: frozenset[Slot] = frozenset()
        self._database = database
        self._connection = connection
        self._process_turn = turn
        self._streams = streams
        self._member = member
        self._held = held
        self._clock = clock
        self._sittings: dict[Topic, Sitting] = {}
        self._readable: list[Slot] = []
        self._moved: set[Slot] = set()
        """Where something may lie that was delivered and is to be delivered again."""
        self._turn = 0
        self._sat = 0.0
        self._until = 0.0
        self._seen = -1
        self._idle: int | None = None
        """The version of the file that has nothing for this member."""

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._process_turn, self._database.errors(), writing(self._connection):
                yield
        except BaseException:
            # Nothing came about: what was noted here is to be read again.
            self._readable, self._seen, self._idle = [], -1, None
            raise

    def _version(self) -> int:
        # Changes with every commit of another connection.
        query = "PRAGMA data_version"
        return patiently(lambda: self._connection.execute(query).fetchone())[0]

    def take(self, most: int) -> list[Taken]:
        """See `Seat.take`."""
        with self._database.errors():
            version = self._version()
        if version == self._idle and not self._due(self._clock()):
            return []
        found: list[Taken] = []
        with self._writing():
            self._sit()
            self._turn += 1
            first = self._turn % max(1, len(self._readable))
            whole = not any(
                self._take(slot, most, found)
                for slot in self._readable[first:] + self._readable[:first]
            )
        self._idle = version if whole and not found else None
        return found

    def _take(self, slot: Slot, most: int, found: list[Taken]) -> bool:
        """Add what one partition has; whether this is all for now."""
        number = self._number(slot)
        while slot in self._moved:
            room = most - len(found)
            rows = self._connection.execute(
                "SELECT pending.position, attempts, body FROM pending"
                " LEFT JOIN messages USING (position)"
                " WHERE grp = ? AND pending.position BETWEEN ? AND ? AND token != ?"
                " ORDER BY pending.position LIMIT ?",
                (self._member.group, *places_of(number), self._member.token, room),
            ).fetchall()
            for position, attempts, body in rows:
                if body is None:
                    self._remove(position)
                elif attempts >= self._member.max_deliveries:
                    self._bury(slot, position, attempts, body, exhausted(attempts))
                else:
                    alone = attempts + 1 >= ALONE
                    if found and alone:
                        return False
                    self._connection.execute(
                        "UPDATE pending SET attempts = attempts + 1, token = ?"
                        " WHERE grp = ? AND position = ?",
                        (self._member.token, self._member.group, position),
                    )
                    found.append(Taken(Place(*slot, position), attempts + 1, body))
                    if alone:
                        return True
            if len(found) == most:
                return True
            if len(rows) < room:
                self._moved.discard(slot)
        return self._take_new(slot, number, most, found)

    def _take_new(self, slot: Slot, number: int, most: int, found: list[Taken]) -> bool:
        positions = self._sittings[slot[0]].positions
        group = self._member.group
        while room := most - len(found):
            rows = self._connection.execute(
                "SELECT position, only, body FROM messages"
                " WHERE position > ? AND position <= ? ORDER BY position LIMIT ?",
                (positions[slot[1]], places_of(number)[1], room),
            ).fetchall()
            if not rows:
                return False
            mine = [(position, body) for position, only, body in rows if only in (None, group)]
            self._connection.executemany(
                "INSERT INTO pending VALUES (?, ?, 1, ?)",
                [(group, position, self._member.token) for position, _ in mine],
            )
            positions[slot[1]] = rows[-1][0]
            self._connection.execute(
                "UPDATE cursors SET position = ? WHERE grp = ? AND slot = ?",
                (rows[-1][0], group, number),
            )
            found += [Taken(Place(*slot, position), 1, body) for position, body in mine]
            if len(rows) < room:
                return False
        return True

    def _number(self, slot: Slot) -> int:
        return self._sittings[slot[0]].number * self._database.partitions + slot[1]

    def _remove(self, position: int | str) -> None:
        self._connection.execute(
            "DELETE FROM pending WHERE grp = ? AND position = ?", (self._member.group, position)
        )

    def _bury(
        self, slot: Slot | Place, position: int | str, attempts: int, body: bytes, reason: str
    ) -> None:
        self._remove(position)
        topic = self._sittings[slot[0]].number
        group = self._member.group
        self._streams.bury(self._connection, topic, group, reason, attempts, time.time(), body)

    def _due(self, now: float) -> bool:
        return not self._sat <= now < self._until

    def _sit(self, *, anew: bool = False) -> None:
        """Renew what it has, and see to its share, where it is time to or things have changed."""
        # Looked at within the transaction: it may have taken long to come to it.
        now, seen = self._clock(), changes(self._connection)
        if not anew and seen == self._seen and not self._due(now):
            return
        before = set(self._readable)
        sittings: dict[Topic, Sitting] = {}
        for topic in self._member.topics:
            held = {
                place.partition
                for place, attempt in self._held.items()
                if attempt and place.topic == topic
            }
            sittings[topic] = sit(
                self._connection, self._database.partitions, self._member, topic, held, now
            )
        settled = all(own.shares.settled for own in sittings.values())
        self._sittings = sittings
        self._readable = [
            (topic, partition)
            for topic, own in sittings.items()
            for partition in sorted(own.shares.keep | own.shares.take)
        ]
        drained = {(topic, p) for topic, own in sittings.items() for p in own.shares.drain}
        self.slots = frozenset(self._readable) | drained
        taken = {(topic, p) for topic, own in sittings.items() for p in own.shares.take}
        self._moved |= taken | (set(self._readable) - before)
        for place in self._held:
            slot = (place.topic, place.partition)
            if slot in taken and self._token(place) != self._member.token:
                self._held[place] = 0
        self._sat, self._until = now, min(own.until for own in sittings.values())
        self._seen = changes(self._connection) if settled else -1

    def settle(self, places: Sequence[Place], outcome: Outcome, reason: str) -> list[Place]:
        """See `Seat.settle`."""
        with self._writing():
            self._sit()
            if outcome is Outcome.DEAD:
                done = sum(self._reject(place, reason) for place in places)
            else:
                group, token = self._member.group, self._member.token
                change = (
                    "DELETE FROM pending"
                    if outcome is Outcome.DONE
                    else "UPDATE pending SET token = ''"
                )
                done = self._connection.executemany(
                    f"{change} WHERE grp = ? AND position = ? AND token = ?",
                    [(group, place.position, token) for place in places],
                ).rowcount
            if outcome is Outcome.BACK:
                self._moved |= {(place.topic, place.partition) for place in places}
                self._idle = None
            if done == len(places):
                return []
            fine = (None, self._member.token, *([""] if outcome is Outcome.BACK else []))
            return [place for place in places if self._token(place) not in fine]

    def _reject(self, place: Place, reason: str) -> bool:
        row = self._connection.execute(
            "SELECT attempts, body FROM pending JOIN messages USING (position)"
            " WHERE grp = ? AND position = ? AND token = ?",
            (self._member.group, place.position, self._member.token),
        ).fetchone()
        if row is not None:
            attempts, body = row
            self._bury(place, place.position, attempts, body, reason)
        return row is not None

    def _token(self, place: Place) -> str | None:
        row = self._connection.execute(
            "SELECT token FROM pending WHERE grp = ? AND position = ?",
            (self._member.group, place.position),
        ).fetchone()
        return None if row is None else row[0]

    def renew(self) -> None:
        """See `Seat.renew`."""
        with self._writing():
            self._sit(anew=True)

    def wait(self, seconds: float) -> None:
        """See `Seat.wait`."""
        until, pause = time.monotonic() + seconds, _SHORTEST_PAUSE
        with self._database.errors():
            while self._version() == self._idle:
                left = until - time.monotonic()
                if left <= 0.0:
                    return
                time.sleep(min(pause, left))
                pause = min(1.3 * pause, _LONGEST_PAUSE)

    def leave(self) -> None:
        """See `Seat.leave`."""
        try:
            with self._writing():
                leave(self._connection, self._database.partitions, self._member)
        finally:
            self._connection.close()

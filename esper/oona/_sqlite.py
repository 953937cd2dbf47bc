"""A broker on a file: durable, and for any number of processes of one machine."""

import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import get_args

from esper.contracts import Topic
from esper.errors import InputError
from esper.oona._broker import Full, Place
from esper.oona._group_commit import GroupCommit
from esper.oona._sqlite_database import Database, Synchronous, writing
from esper.oona._sqlite_group import forget, join
from esper.oona._sqlite_seat import SqliteSeat
from esper.oona._sqlite_statistics import statistics
from esper.oona._sqlite_streams import Streams
from esper.oona._statistics import BusStatistics
from esper.oona._store import CAPACITY, Member, Record, StoredLetter
from esper.oona._stored import StoredBroker, check_limits


class SqliteBroker(StoredBroker):
    """A `Broker` on a file that processes of one machine share.

    What was published outlives them all, killed or not. With `synchronous="full"` it outlives a
    power cut too, which costs a write to the disk for each batch.

    Args:
        path: the file; it and two files beside it are made where they are not there.
        synchronous: `normal` or `full`.
        capacity: messages that a topic holds at most.
        full: what a topic does that holds so many of which some group has not acknowledged one.
        partitions: of each topic: how many consumers of a group can share it. 8 by default.
        clock: seconds by which leases run out, the same for all processes.

    Raises:
        InputError: for a file of somebody else, or what cannot be asked for.
        SchemaVersionError: for a file that a newer version of Esper made.
        BusError: where the file cannot be used.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        synchronous: Synchronous = "normal",
        capacity: int = CAPACITY,
        full: Full = "drop",
        partitions: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_limits(capacity, full, partitions)
        if synchronous not in get_args(Synchronous):
            raise InputError(f"synchronous is 'normal' or 'full', not {synchronous!r}")
        database = Database(Path(path), synchronous, partitions)
        super().__init__(SqliteStore(database, Streams(capacity, full), clock))


class SqliteStore:
    """A `Store` on a file."""

    def __init__(self, database: Database, streams: Streams, clock: Callable[[], float]) -> None:
        self.partitions = database.partitions
        self._database = database
        self._streams = streams
        self._clock = clock
        self._turn = threading.Lock()
        """Held by the one thread of this process that writes: those of others wait less well."""
        with database.errors():
            self._connection = database.connect()
        self._commits = GroupCommit(self._turn, self._write)

    def append(self, records: Sequence[Record]) -> None:
        """See `Store.append`."""
        with self._database.errors():
            self._commits.submit(records)

    def _write(self, batches: Sequence[Sequence[Record]]) -> list[Exception | None]:
        """Append all batches in one transaction; for each, why it was refused by itself."""
        with writing(self._connection):
            return [
                self._streams.append(self._connection, self.partitions, batch) for batch in batches
            ]

    def join(self, member: Member, held: MutableMapping[Place, int]) -> SqliteSeat:
        """See `Store.join`."""
        with self._database.errors():
            connection = self._database.connect()
            try:
                with self._turn, writing(connection):
                    join(connection, self.partitions, member, self._clock())
            except BaseException:
                connection.close()
                raise
        return SqliteSeat(
            self._database, connection, self._turn, self._streams, member, held, self._clock
        )

    def letters(self, topic: Topic | None, limit: int) -> list[StoredLetter]:
        """See `Store.letters`."""
        # A newer Esper that writes to the file may have topics that this one does not know.
        topics = tuple(Topic) if topic is None else (topic,)
        marks = ", ".join("?" * len(topics))
        with self._turn, self._database.errors():
            rows = self._connection.execute(
                "SELECT letter, topic, grp, reason, attempts, at, body FROM letters"
                f" JOIN topics USING (number) WHERE topic IN ({marks})"
                " ORDER BY letter LIMIT ?",
                (*topics, limit),
            ).fetchall()
        return [StoredLetter(row[0], Topic(row[1]), *row[2:]) for row in rows]

    def redrive(self, letters: Mapping[int, Record]) -> int:
        """See `Store.redrive`."""
        with self._turn, self._database.errors(), writing(self._connection):
            return self._streams.redrive(self._connection, self.partitions, letters)

    def remove_group(self, group: str) -> None:
        """See `Store.remove_group`."""
        with self._turn, self._database.errors(), writing(self._connection):
            forget(self._connection, group)

    def statistics(self) -> BusStatistics:
        """See `Store.statistics`."""
        with self._turn, self._database.errors():
            # One state of the file for all that is counted.
            self._connection.execute("BEGIN")
            try:
                return statistics(self._connection, self.partitions, self._clock())
            finally:
                self._connection.execute("COMMIT")

    def close(self) -> None:
        """See `Store.close`."""
        with self._turn, self._database.errors():
            self._connection.close()

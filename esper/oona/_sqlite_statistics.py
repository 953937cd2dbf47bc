"""How full the streams in a file are, and how far its groups."""

import sqlite3

from esper.contracts import Topic
from esper.oona._shares import Lease
from esper.oona._sqlite_streams import places_of
from esper.oona._statistics import BusStatistics, GroupStatistics, TopicStatistics


def statistics(connection: sqlite3.Connection, partitions: int, now: float) -> BusStatistics:
    """Count what is there."""
    marks = ", ".join("?" * len(Topic))
    rows = connection.execute(
        "SELECT topic, number, length, dropped,"
        " (SELECT count(*) FROM letters WHERE letters.number = topics.number)"
        # A newer Esper that writes to the file may have topics that this one does not know.
        f" FROM topics WHERE topic IN ({marks}) ORDER BY topic",
        tuple(Topic),
    ).fetchall()
    topics = [TopicStatistics(Topic(topic), *own) for topic, _, *own in rows]
    groups = [
        GroupStatistics(
            group,
            Topic(topic),
            *_reading(connection, group, number * partitions, partitions),
            _alive(connection, group, number, now),
        )
        for topic, number, *_ in rows
        for (group,) in connection.execute(
            "SELECT grp FROM cursors WHERE slot = ? ORDER BY grp", (number * partitions,)
        ).fetchall()
    ]
    return BusStatistics(tuple(topics), tuple(groups))


def _reading(
    connection: sqlite3.Connection, group: str, first: int, partitions: int
) -> tuple[int, int]:
    """Messages that a group has to come, and those that it has and did not settle."""
    lag = pending = 0
    for slot in range(first, first + partitions):
        (position,) = connection.execute(
            "SELECT position FROM cursors WHERE grp = ? AND slot = ?", (group, slot)
        ).fetchone()
        first, last = places_of(slot)
        behind = "SELECT count(*) FROM messages WHERE position > ? AND position <= ?"
        others = f"{behind} AND only IS NOT NULL AND only != ?"
        lag += connection.execute(behind, (position, last)).fetchone()[0]
        lag -= connection.execute(others, (position, last, group)).fetchone()[0]
        pending += connection.execute(
            "SELECT count(*) FROM pending WHERE grp = ? AND position BETWEEN ? AND ?",
            (group, first, last),
        ).fetchone()[0]
    return lag, pending


def _alive(connection: sqlite3.Connection, group: str, number: int, now: float) -> int:
    rows = connection.execute(
        "SELECT token, until, seconds FROM members WHERE grp = ? AND number = ?", (group, number)
    ).fetchall()
    return sum(Lease(*row).runs(now) for row in rows)

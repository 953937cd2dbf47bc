"""Groups in a file: who is in them, and who has which partition. Calls are within a transaction."""

import sqlite3
from collections.abc import Collection
from typing import NamedTuple

from esper.contracts import Topic
from esper.oona._broker import Start
from esper.oona._shares import Lease, Shares, share, soonest
from esper.oona._sqlite_streams import places_of, topic_number
from esper.oona._store import Member
from esper.oona._stored_consumer import replaced


def changed(connection: sqlite3.Connection) -> None:
    """Tell all members that they are to look at their shares again."""
    connection.execute("UPDATE settings SET value = value + 1 WHERE name = 'changes'")


def changes(connection: sqlite3.Connection) -> int:
    """How often they were told."""
    return connection.execute("SELECT value FROM settings WHERE name = 'changes'").fetchone()[0]


def join(connection: sqlite3.Connection, partitions: int, member: Member, now: float) -> None:
    """Come into a group, under the name of whoever was there before."""
    for topic in member.topics:
        number = topic_number(connection, topic)
        _begin(connection, partitions, member.group, number, member.start)
        before = connection.execute(
            "SELECT token FROM members WHERE grp = ? AND number = ? AND name = ?",
            (member.group, number, member.name),
        ).fetchone()
        if before is not None:
            _let_go(connection, partitions, member.group, number, before[0])
        _enter(connection, number, member, now)
    changed(connection)


def leave(connection: sqlite3.Connection, partitions: int, member: Member) -> None:
    """Go, and leave everything to the others."""
    for topic in member.topics:
        number = topic_number(connection, topic)
        connection.execute(
            "DELETE FROM members WHERE grp = ? AND number = ? AND token = ?",
            (member.group, number, member.token),
        )
        _let_go(connection, partitions, member.group, number, member.token)
    changed(connection)


def forget(connection: sqlite3.Connection, group: str) -> None:
    """Remove all that is known of a group."""
    for table in ("cursors", "pending", "members"):
        connection.execute(f"DELETE FROM {table} WHERE grp = ?", (group,))
    changed(connection)


def _begin(
    connection: sqlite3.Connection, partitions: int, group: str, number: int, start: Start
) -> None:
    """Have a group where there is none yet."""
    first = number * partitions
    query = "SELECT 1 FROM cursors WHERE grp = ? AND slot = ?"
    if connection.execute(query, (group, first)).fetchone():
        return
    (last,) = connection.execute("SELECT last FROM topics WHERE number = ?", (number,)).fetchone()
    behind = last if start == "new" else 0
    connection.executemany(
        "INSERT INTO cursors (grp, slot, position) VALUES (?, ?, ?)",
        [(group, slot, places_of(slot)[0] + behind) for slot in range(first, first + partitions)],
    )


def _enter(connection: sqlite3.Connection, number: int, member: Member, now: float) -> None:
    seconds = member.lease_seconds
    connection.execute(
        "INSERT OR REPLACE INTO members (grp, number, name, token, until, seconds)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (member.group, number, member.name, member.token, now + seconds, seconds),
    )


def _let_go(
    connection: sqlite3.Connection, partitions: int, group: str, number: int, token: str
) -> None:
    first, last = number * partitions, (number + 1) * partitions - 1
    connection.execute(
        "UPDATE pending SET token = '' WHERE grp = ? AND position BETWEEN ? AND ? AND token = ?",
        (group, places_of(first)[0], places_of(last)[1], token),
    )
    connection.execute(
        "UPDATE cursors SET token = '' WHERE grp = ? AND slot BETWEEN ? AND ? AND token = ?",
        (group, first, last, token),
    )


class Sitting(NamedTuple):
    """What a member has of a topic."""

    number: int
    shares: Shares
    positions: dict[int, int]
    """Of what was delivered last, by partition."""
    until: float
    """When to look again at the latest."""


def sit(
    connection: sqlite3.Connection,
    partitions: int,
    member: Member,
    topic: Topic,
    held: Collection[int],
    now: float,
) -> Sitting:
    """Renew what a member has of a topic, and see to its share.

    Args:
        held: partitions of which it has something that is not settled.

    Raises:
        LeaseLostError: where another has its name.
    """
    number = topic_number(connection, topic)
    # One that was removed meanwhile begins with what is there: nothing is left out.
    _begin(connection, partitions, member.group, number, "all")
    members = _members(connection, member, number, now)
    first = number * partitions
    rows = connection.execute(
        "SELECT slot, position, token, until, seconds FROM cursors"
        " WHERE grp = ? AND slot BETWEEN ? AND ?",
        (member.group, first, first + partitions - 1),
    ).fetchall()
    leases = {slot - first: Lease(*own) for slot, _, *own in rows if own[0]}
    tokens = {lease.token for lease in members}
    shares = share(member.token, leases, partitions, tokens, held, now)
    own = shares.keep | shares.drain | shares.take
    seconds = member.lease_seconds
    connection.executemany(
        "UPDATE cursors SET token = ?, until = ?, seconds = ? WHERE grp = ? AND slot = ?",
        [(member.token, now + seconds, seconds, member.group, first + each) for each in own],
    )
    if shares.free:
        connection.executemany(
            "UPDATE cursors SET token = '' WHERE grp = ? AND slot = ?",
            [(member.group, first + each) for each in shares.free],
        )
        changed(connection)
    positions = {slot - first: position for slot, position, *_ in rows}
    until = soonest(now + seconds / 4, member.token, leases.values(), members)
    return Sitting(number, shares, positions, until)


def _members(
    connection: sqlite3.Connection, member: Member, number: int, now: float
) -> list[Lease]:
    """Those whose lease runs, with the own one renewed; the others are removed."""
    rows = connection.execute(
        "SELECT name, token, until, seconds FROM members WHERE grp = ? AND number = ?",
        (member.group, number),
    ).fetchall()
    there = {name: Lease(*own) for name, *own in rows}
    own = there.get(member.name)
    if own is not None and own.token != member.token:
        raise replaced(member)
    there[member.name] = Lease(member.token, now + member.lease_seconds, member.lease_seconds)
    _enter(connection, number, member, now)
    gone = [name for name, lease in there.items() if not lease.runs(now)]
    connection.executemany(
        "DELETE FROM members WHERE grp = ? AND number = ? AND name = ?",
        [(member.group, number, name) for name in gone],
    )
    return [lease for name, lease in there.items() if name not in gone]

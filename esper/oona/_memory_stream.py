"""The messages of one topic in memory, and how far its groups have read them."""

from typing import NamedTuple

from esper.contracts import OonaMessage, Topic
from esper.oona._broker import Place, Start
from esper.oona._shares import Lease
from esper.oona._store import Record, Taken


class Dead(NamedTuple):
    """A dead letter, without its number."""

    topic: Topic
    group: str
    reason: str
    attempts: int
    at: float
    body: bytes


class Entry(NamedTuple):
    """A message where it lies."""

    order: int
    """Among all of its topic."""
    message_id: str
    body: bytes
    group: str
    """The only one that it is for; empty where it is for all."""
    message: OonaMessage | None


class Partition:
    """A run of messages: those from `first` to before `end`, counted from 1."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.first = 1
        self.end = 1

    def append(self, entry: Entry) -> None:
        """Add one at the end."""
        self.entries[self.end] = entry
        self.end += 1

    def pop(self) -> Entry:
        """Remove the first one."""
        entry = self.entries.pop(self.first)
        self.first += 1
        return entry


class Cursor:
    """How far a group is with a partition."""

    def __init__(self, partition: Partition, place: int) -> None:
        self.partition = partition
        self.lease: Lease | None = None
        self.pending: dict[int, tuple[int, str]] = {}
        """What was delivered and not settled, in order: how often, and to which token; to none
        where it was given back."""
        self.moved = False
        """Whether some of what is pending may be nobody's, or another's than the lease's."""
        self._next = place

    def returned(self, token: str) -> list[int]:
        """What is to be delivered again by the one who has the partition now."""
        if not self.moved:
            return []
        found = [place for place, (_, own) in self.pending.items() if own != token]
        self.moved = bool(found)
        return found

    def give_back(self, place: int) -> None:
        """Let something that is pending be delivered again."""
        self.pending[place] = (self.pending[place][0], "")
        self.moved = True

    def next_for(self, group: str) -> int | None:
        """The first message that was never delivered; what is for others is passed over."""
        self._next = max(self._next, self.partition.first)
        while self._next < self.partition.end:
            if self.partition.entries[self._next].group in ("", group):
                return self._next
            self._next += 1
        return None

    def deliver(self, topic: Topic, partition: int, place: int, token: str) -> Taken:
        """Hand a message to who has the partition."""
        attempt = self.pending.get(place, (0, ""))[0] + 1
        self.pending[place] = (attempt, token)
        self._next = max(self._next, place + 1)
        entry = self.partition.entries[place]
        return Taken(Place(topic, partition, place), attempt, entry.body, entry.message)

    @property
    def has_more(self) -> bool:
        """Whether there may be something for who has the partition."""
        return self._next < self.partition.end or self.moved

    def lag(self, group: str) -> int:
        """Messages that were never delivered."""
        places = range(max(self._next, self.partition.first), self.partition.end)
        return sum(self.partition.entries[place].group in ("", group) for place in places)

    @property
    def acknowledged(self) -> int:
        """All before this one was settled."""
        return min(self.pending, default=self._next)


class Reading:
    """A group's reading of a topic."""

    def __init__(self, group: str, cursors: list[Cursor]) -> None:
        self.group = group
        self.cursors = cursors
        self.members: dict[str, Lease] = {}
        """By name."""

    def alive(self, now: float) -> set[str]:
        """The names of members whose lease runs."""
        return {name for name, lease in self.members.items() if lease.runs(now)}

    def let_go(self, token: str) -> None:
        """Give up all that a member has."""
        for cursor in self.cursors:
            if cursor.lease is not None and cursor.lease.token == token:
                cursor.lease = None
            for place, (_, own) in cursor.pending.items():
                if own == token:
                    cursor.give_back(place)


class Stream:
    """The messages of one topic."""

    def __init__(self, partitions: int) -> None:
        self.partitions = [Partition() for _ in range(partitions)]
        self.readings: dict[str, Reading] = {}
        self.ids: set[str] = set()
        """Of the messages that it holds."""
        self.length = 0
        self.dropped = 0
        self.letters: dict[int, Dead] = {}
        """By their numbers, oldest first."""
        self._order = 0

    def append(self, record: Record, group: str = "") -> None:
        """Add a message at the end of its partition, for one group alone where one is named."""
        message_id = record.message_id
        entry = Entry(self._order, message_id, record.body, group, record.message)
        self.partitions[record.partition].append(entry)
        self._order += 1
        self.length += 1
        if message_id:
            self.ids.add(message_id)

    def reading(self, group: str, start: Start) -> Reading:
        """A group's, which is made where it is not there."""
        if group not in self.readings:
            cursors = [Cursor(p, p.first if start == "all" else p.end) for p in self.partitions]
            self.readings[group] = Reading(group, cursors)
        return self.readings[group]

    def free_acknowledged(self) -> None:
        """Let go of what all groups have acknowledged; without a group, nobody has."""
        if not self.readings:
            return
        for number, partition in enumerate(self.partitions):
            until = min(own.cursors[number].acknowledged for own in self.readings.values())
            while partition.first < min(until, partition.end):
                self._pop(partition)

    def trim(self, capacity: int) -> None:
        """Let go of what is too much: first what was acknowledged, then the oldest."""
        if self.length > capacity:
            self.free_acknowledged()
        while self.length > capacity:
            oldest = min(
                (p for p in self.partitions if p.first < p.end),
                key=lambda p: p.entries[p.first].order,
            )
            place, number = oldest.first, self.partitions.index(oldest)
            self._pop(oldest)
            self.dropped += 1
            for reading in self.readings.values():
                reading.cursors[number].pending.pop(place, None)

    def _pop(self, partition: Partition) -> None:
        entry = partition.pop()
        self.length -= 1
        self.ids.discard(entry.message_id)

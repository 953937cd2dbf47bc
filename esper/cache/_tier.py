"""Values kept up to a number of bytes and entries; those worth least go first.

What an entry is worth is its grade divided by its age plus one. The grade is a
measured weight from 0 to 1 in steps of 1/64, the age how many accesses of the
tier came after the entry's own last one: so which entry goes depends on what
was asked for, and on no clock. Entries of one grade lie in the order of their
last access, so that the next to go is one of at most 65 candidates.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Literal, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

GRADES = 64
"""Steps in which a weight from 0 to 1 is measured."""

Reason = Literal["bytes", "entries"]
"""For want of what an entry was evicted."""


class Entry(Generic[V]):
    """A value that is kept."""

    __slots__ = ("fresh", "grade", "size", "touched", "value")

    def __init__(self, value: V, size: int, grade: int, touched: int, fresh: bool) -> None:
        self.value = value
        self.size = size
        self.grade = grade
        self.touched = touched
        self.fresh = fresh


class Evicted(NamedTuple, Generic[K]):
    """An entry that went to make room."""

    key: K
    reason: Reason
    fresh: bool
    """Whether it went before anybody had asked for it."""


class Tier(Generic[K, V]):
    """A bounded mapping with adaptive eviction. Whoever shares it among threads locks it.

    Args:
        max_bytes: most bytes of all entries together.
        max_entries: most entries; None for any number.
    """

    def __init__(self, max_bytes: int, max_entries: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.bytes = 0
        """Sum of the sizes of all entries."""
        self._now = 0
        self._entries: dict[K, Entry[V]] = {}
        self._by_grade: tuple[OrderedDict[K, Entry[V]], ...] = tuple(
            OrderedDict() for _ in range(GRADES + 1)
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def get(self, key: K) -> Entry[V] | None:
        """The entry of a key, which counts as an access of it; or None."""
        entry = self._entries.get(key)
        if entry is not None:
            self._now += 1
            entry.touched = self._now
            self._by_grade[entry.grade].move_to_end(key)
        return entry

    def peek(self, key: K) -> Entry[V] | None:
        """The entry of a key, without an access of it; or None."""
        return self._entries.get(key)

    def admits(self, size: int) -> bool:
        """Whether an entry of this size is kept at all."""
        return size <= self.max_bytes and self.max_entries != 0

    def put(
        self, key: K, value: V, size: int, grade: int, *, fresh: bool = False
    ) -> list[Evicted[K]]:
        """Keep an admitted value, in place of what the key had; counts as an access.

        Args:
            fresh: that nobody has asked for it yet.

        Returns:
            What was evicted to make room, in order.
        """
        self.drop(key)
        self._now += 1
        evicted: list[Evicted[K]] = []
        while reason := self._wanting(size):
            victim = self.next_to_go()
            if victim is None:
                raise ValueError(f"{size} bytes are more than the {self.max_bytes} of the tier")
            evicted.append(Evicted(victim, reason, self._entries[victim].fresh))
            self.drop(victim)
        entry = self._entries[key] = Entry(value, size, grade, self._now, fresh)
        self._by_grade[grade][key] = entry
        self.bytes += size
        return evicted

    def _wanting(self, size: int) -> Reason | None:
        if self.max_entries is not None and len(self._entries) >= self.max_entries:
            return "entries"
        return "bytes" if self.bytes + size > self.max_bytes else None

    def next_to_go(self) -> K | None:
        """The key of the entry that is worth least, of several the one unused longest."""
        found: K | None = None
        least, oldest, after = math.inf, 0, self._now + 1
        for grade, keys in enumerate(self._by_grade):
            if keys:
                key = next(iter(keys))
                touched = keys[key].touched
                # Of such small numbers, unequal quotients are unequal as floats too.
                worth = grade / (after - touched)
                if worth < least or (worth == least and touched < oldest):
                    found, least, oldest = key, worth, touched
        return found

    def regrade(self, key: K, grade: int) -> None:
        """Give an entry another grade; nothing where there is no such entry."""
        entry = self._entries.get(key)
        if entry is None or entry.grade == grade:
            return
        del self._by_grade[entry.grade][key]
        entry.grade = grade
        keys = self._by_grade[grade]
        keys[key] = entry
        # Mostly it was just accessed itself, and the first step ends the search.
        newer: list[K] = []
        for other in reversed(keys):
            if keys[other].touched < entry.touched:
                break
            if other != key:
                newer.append(other)
        for other in reversed(newer):
            keys.move_to_end(other)

    def drop(self, key: K) -> int:
        """Let go of an entry; its bytes, or 0 where there was none."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return 0
        del self._by_grade[entry.grade][key]
        self.bytes -= entry.size
        return entry.size

    def clear(self) -> list[tuple[K, Entry[V]]]:
        """Let go of all; what there was."""
        gone = list(self._entries.items())
        self._entries.clear()
        for keys in self._by_grade:
            keys.clear()
        self.bytes = 0
        return gone

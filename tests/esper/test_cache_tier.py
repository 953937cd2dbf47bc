"""The bounded mapping against one that is obviously right: a list, searched from end to end."""

import dataclasses
from fractions import Fraction

import cachetools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper.cache._tier import GRADES, Tier

MAX_BYTES, MAX_ENTRIES = 100, 7

GRADED = st.sampled_from([0, 1, 32, 33, GRADES])
"""Few, so that several entries are of one grade."""


@dataclasses.dataclass
class Line:
    key: int
    size: int
    grade: int
    touched: int


class TierAgainstAList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tier: Tier[int, str] = Tier(MAX_BYTES, MAX_ENTRIES)
        self.lines: list[Line] = []
        self.now = 0

    def line(self, key: int) -> Line | None:
        return next((line for line in self.lines if line.key == key), None)

    def worth(self, line: Line) -> tuple[Fraction, int]:
        return Fraction(line.grade, GRADES) / (self.now - line.touched + 1), line.touched

    @rule(key=st.integers(0, 9), size=st.integers(0, 30), grade=GRADED)
    def put(self, key: int, size: int, grade: int) -> None:
        expected = []
        self.lines = [line for line in self.lines if line.key != key]
        self.now += 1
        while True:
            if len(self.lines) >= MAX_ENTRIES:
                reason = "entries"
            elif sum(line.size for line in self.lines) + size > MAX_BYTES:
                reason = "bytes"
            else:
                break
            worst = min(self.lines, key=self.worth)
            self.lines.remove(worst)
            expected.append((worst.key, reason, False))
        self.lines.append(Line(key, size, grade, self.now))
        assert [tuple(gone) for gone in self.tier.put(key, str(key), size, grade)] == expected

    @rule(key=st.integers(0, 9))
    def get(self, key: int) -> None:
        line, found = self.line(key), self.tier.get(key)
        assert (found is None) == (line is None)
        if line is not None and found is not None:
            self.now += 1
            line.touched = self.now
            assert (found.value, found.size) == (str(key), line.size)

    @rule(key=st.integers(0, 9), grade=GRADED)
    def regrade(self, key: int, grade: int) -> None:
        self.tier.regrade(key, grade)
        line = self.line(key)
        if line is not None:
            line.grade = grade

    @rule(key=st.integers(0, 9))
    def drop(self, key: int) -> None:
        line = self.line(key)
        assert self.tier.drop(key) == (0 if line is None else line.size)
        self.lines = [line for line in self.lines if line.key != key]

    @rule(now=st.integers(0, 9))
    def drain(self, now: int) -> None:
        while now == 0 and self.lines:
            worst = min(self.lines, key=self.worth)
            self.lines.remove(worst)
            assert self.tier.next_to_go() == worst.key
            self.tier.drop(worst.key)

    @rule(now=st.integers(0, 9))
    def clear(self, now: int) -> None:
        if now == 0:
            assert {key for key, _ in self.tier.clear()} == {line.key for line in self.lines}
            self.lines = []

    @invariant()
    def holds_the_same(self) -> None:
        assert set(self.tier) == {line.key for line in self.lines}
        assert len(self.tier) == len(self.lines)
        assert self.tier.bytes == sum(line.size for line in self.lines) <= MAX_BYTES
        worst = min(self.lines, key=self.worth) if self.lines else None
        assert self.tier.next_to_go() == (None if worst is None else worst.key)


TestTierAgainstAList = TierAgainstAList.TestCase
TestTierAgainstAList.settings = settings(max_examples=150, stateful_step_count=60)


def test_of_equal_grades_the_one_unused_longest_goes():
    tier: Tier[str, None] = Tier(3)
    for key in "abc":
        tier.put(key, None, 1, 32)
    tier.get("a")
    assert [gone.key for gone in tier.put("d", None, 1, 32)] == ["b"]


def test_a_good_kernel_outlives_a_newer_poor_one_but_not_for_ever():
    tier: Tier[str, None] = Tier(2)
    tier.put("good", None, 1, 64)
    tier.put("poor", None, 1, 8)
    assert tier.next_to_go() == "poor"
    for _ in range(20):
        tier.get("poor")
    assert tier.next_to_go() == "good"


def test_a_kernel_that_always_fails_goes_first_however_new():
    tier: Tier[str, None] = Tier(3)
    tier.put("old", None, 1, 1)
    for _ in range(100):
        tier.get("old")
    tier.put("useless", None, 1, 0)
    assert tier.next_to_go() == "useless"


def test_what_is_larger_than_the_tier_is_not_admitted():
    tier: Tier[str, None] = Tier(10, 3)
    assert tier.admits(10)
    assert not tier.admits(11)
    assert not Tier(10, 0).admits(1)
    with pytest.raises(ValueError, match="11 bytes are more than the 10 of the tier"):
        tier.put("a", None, 11, 32)


@given(order=st.permutations(range(6)))
def test_those_of_one_grade_go_in_the_order_of_their_last_access(order):
    tier: Tier[int, None] = Tier(6)
    for key in range(6):
        tier.put(key, None, 1, 1)
    # However they came to be of one grade.
    for key in order:
        tier.regrade(key, 32)
    gone = []
    while (key := tier.next_to_go()) is not None:
        gone.append(key)
        tier.drop(key)
    assert gone == list(range(6))


@given(asks=st.lists(st.integers(0, 12), max_size=120))
def test_where_nothing_was_measured_it_is_an_lru_cache(asks):
    tier: Tier[int, None] = Tier(1000, 5)
    lru: cachetools.LRUCache[int, None] = cachetools.LRUCache(5)
    for key in asks:
        assert (tier.get(key) is None) == (key not in lru)
        if key in lru:
            _ = lru[key]
        else:
            tier.put(key, None, 1, 32)
            lru[key] = None
        assert set(tier) == set(lru)

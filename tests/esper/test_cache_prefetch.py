"""What is expected next, and that fetching it is in nobody's way."""

import atexit
import gc
import os
import random
import subprocess
import sys
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.cache import KernelCache
from esper.cache._history import FollowTable
from esper.cache._prefetch import _started
from tests.esper.cache_kernels import DOWN, Shelf, variant


@pytest.fixture(scope="module")
def kernels(artifact):
    return [variant(artifact, number) for number in range(6)]


# ---- what is expected ----


@given(
    asks=st.lists(st.sampled_from("abcde"), max_size=60),
    count=st.integers(1, 4),
)
def test_expected_is_what_followed_most_often(asks, count):
    table = FollowTable()
    followed = {key: Counter() for key in "abcde"}
    first: dict[tuple[str, str], int] = {}
    for place, key in enumerate(asks):
        table.saw(key)
        if place and asks[place - 1] != key:
            followed[asks[place - 1]][key] += 1
            first.setdefault((asks[place - 1], key), place)
    for key in "abcde":
        likely = [other for other, times in followed[key].items() if times >= 2]
        likely.sort(key=lambda other, key=key: (-followed[key][other], first[key, other]))
        assert table.expected(key, count) == likely[:count]


def test_one_history_gives_one_expectation():
    chance = random.Random(0)
    asks = [str(chance.randrange(200)) for _ in range(5000)]
    tables = [FollowTable(rows=50, width=4) for _ in range(2)]
    for table in tables:
        for key in asks:
            table.saw(key)
    assert all(tables[0].expected(str(n), 3) == tables[1].expected(str(n), 3) for n in range(200))
    assert len(tables[0]) == 50


def test_followers_are_bounded_and_the_rarest_makes_room():
    table = FollowTable(width=2)
    for follower in "bbccd":
        table.saw("a")
        table.saw(follower)
    # d took the place of b, the first of the rarest.
    table.saw("a")
    table.saw("d")
    assert table.expected("a", 5) == ["c", "d"]


# ---- fetching it ----


def cycle(cache: KernelCache, kernels, times: int) -> None:
    for _ in range(times):
        for kernel in kernels:
            assert cache.load_kernel_sync(kernel.kernel_id) is not None
            assert cache.wait_for_prefetches(30)


def test_kernels_asked_for_in_turn_are_there_before_they_are_asked_for(kernels):
    # Three of six fit: without looking ahead, a cycle misses every time.
    plain = KernelCache(Shelf(*kernels), max_entries=3)
    for _ in range(10):
        for kernel in kernels:
            plain.load_kernel_sync(kernel.kernel_id)
    assert plain.get_cache_stats()["hits"] == 0
    found = []
    for _ in range(2):
        cache = KernelCache(Shelf(*kernels), max_entries=3, prefetch=1)
        cycle(cache, kernels, 10)
        found.append(cache.get_enhanced_stats())
        cache.close()
    # One history, one outcome.
    assert found[0] == found[1]
    stats = found[0]
    # Twice round, one has followed another twice.
    assert stats["misses"] == 13
    assert stats["hits"] == 47
    assert stats["prefetches_used"] == 47
    assert stats["prefetches"] == stats["prefetches_fetched"] == 48
    assert (stats["prefetches_failed"], stats["prefetches_wasted"]) == (0, 0)


def test_a_caller_does_not_wait_for_what_is_fetched_ahead(kernels):
    library = Shelf(*kernels)
    cache = KernelCache(library, prefetch=1)
    cycle(cache, kernels[:2], 3)
    library.gate = threading.Event()
    assert cache.prefetch(kernel.kernel_id for kernel in kernels[2:4]) == 2
    for _ in range(3):
        assert cache.load_kernel_sync(kernels[0].kernel_id) is not None
    assert not cache.wait_for_prefetches(0)
    # Once each, however often they are wanted.
    assert cache.prefetch([kernels[2].kernel_id, kernels[3].kernel_id, kernels[0].kernel_id]) == 0
    library.gate.set()
    assert cache.wait_for_prefetches(30)
    assert cache.get_enhanced_stats()["prefetches_fetched"] == 2
    assert library.asks.count(kernels[2].kernel_id) == 1
    cache.close()


def test_an_ask_for_what_is_on_its_way_is_one_fetch_and_a_use(kernels):
    library = Shelf(*kernels)
    library.gate = threading.Event()
    cache = KernelCache(library)
    cache.prefetch([kernels[0].kernel_id])
    assert library.asked.wait(30)
    opened = threading.Timer(0.05, library.gate.set)
    opened.start()
    assert cache.load_kernel_sync(kernels[0].kernel_id) is not None
    assert cache.wait_for_prefetches(30)
    stats = cache.get_enhanced_stats()
    assert len(library.asks) == 1
    assert (stats["joined"], stats["prefetches_used"], stats["fetched"]) == (1, 1, 0)
    cache.close()


def test_what_waits_can_be_cancelled_and_there_is_an_end_to_waiting(kernels):
    library = Shelf(*kernels)
    library.gate = threading.Event()
    cache = KernelCache(library)
    assert cache.prefetch([kernels[0].kernel_id]) == 1
    assert library.asked.wait(30)
    assert cache.prefetch(f"{number:064}" for number in range(20)) == 16
    stats = cache.get_enhanced_stats()
    assert (stats["prefetches_waiting"], stats["prefetches_dropped"]) == (16, 4)
    assert cache.cancel_prefetches() == 16
    library.gate.set()
    assert cache.wait_for_prefetches(30)
    assert library.asks == [kernels[0].kernel_id]
    cache.close()
    assert cache.prefetch([kernels[1].kernel_id]) == 0


def test_a_fetch_ahead_that_brings_nothing_is_an_event_and_no_error(kernels):
    library = Shelf()
    cache = KernelCache(library)
    cache.prefetch([kernels[0].kernel_id])
    assert cache.wait_for_prefetches(30)
    library.down = DOWN
    cache.prefetch([kernels[1].kernel_id])
    assert cache.wait_for_prefetches(30)
    stats = cache.get_enhanced_stats()
    assert (stats["prefetches"], stats["prefetches_failed"]) == (2, 2)
    # Nobody asked.
    assert (stats["misses"], stats["not_found"], stats["failed"]) == (0, 0, 0)
    told = [(event.kind, event.detail) for event in cache.events()]
    assert told == [
        ("prefetch", "it is not in the library"),
        ("library", "the database is locked"),
        ("prefetch", "the database is locked"),
    ]
    cache.close()


def test_what_was_fetched_ahead_and_never_used_is_counted(kernels):
    cache = KernelCache(Shelf(*kernels), max_entries=1)
    cache.prefetch([kernels[0].kernel_id])
    assert cache.wait_for_prefetches(30)
    cache.load_kernel_sync(kernels[1].kernel_id)
    assert cache.get_enhanced_stats()["prefetches_wasted"] == 1
    cache.close()


def test_nothing_is_fetched_ahead_unless_it_is_asked_for(kernels):
    library = Shelf(*kernels)
    cache = KernelCache(library, max_entries=3)
    before = threading.active_count()
    cycle(cache, kernels, 4)
    assert cache.get_enhanced_stats()["prefetches"] == 0
    assert threading.active_count() == before


def test_the_thread_is_of_low_priority_and_no_other_is(kernels):
    seen = []

    class Watching(Shelf):
        def get(self, kernel_id):
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return super().get(kernel_id)

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    cache = KernelCache(Watching(*kernels))
    cache.prefetch([kernels[0].kernel_id])
    assert cache.wait_for_prefetches(30)
    cache.load_kernel_sync(kernels[1].kernel_id)
    cache.close()
    assert seen == [min(19, before + 10) if sys.platform == "linux" else before, before]


def test_caches_leave_nothing_behind_that_is_to_be_done_at_exit(kernels):
    registered, before = [], len(_started)
    for _ in range(4):
        cache = KernelCache(Shelf(*kernels))
        cache.prefetch([kernels[0].kernel_id])
        assert cache.wait_for_prefetches(30)
        registered.append(atexit._ncallbacks())
    assert len(set(registered)) == 1
    del cache
    gc.collect()
    assert len(_started) <= before


EXIT = """
import sys, threading, time
from esper.cache import KernelCache

class Slow:
    def get(self, kernel_id):
        began.set()
        time.sleep(0.3)
        ended.append(kernel_id)
        raise OSError("slow")

import atexit
atexit.register(lambda: print(ended, flush=True))
began, ended = threading.Event(), []
cache = KernelCache(Slow())
cache.prefetch(["a" * 64, "b" * 64])
assert began.wait(30)
"""


def test_it_stops_at_exit():
    done = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, check=True, timeout=60
    )
    # What was being fetched has ended, what waited never began, and nothing crashed.
    assert done.stdout == f"{['a' * 64]}\n"
    assert done.stderr == ""

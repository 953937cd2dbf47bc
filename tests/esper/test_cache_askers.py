"""Many askers, one fetch: threads and coroutines, cancelled ones, and a library that is down."""

import asyncio
import dataclasses
import gc
import random
import threading
import weakref

import pytest

from esper.cache import KernelCache
from esper.cache._flights import Flights
from esper.errors import ArtifactError, LibraryError
from tests.esper.cache_kernels import DOWN, Shelf, held_bytes, variant

ENDS = ("disk_hits", "fetched", "not_found", "failed", "joined", "interrupted")


@pytest.fixture(scope="module")
def kernels(artifact):
    return [variant(artifact, number, padding=700 * (number % 4)) for number in range(12)]


def in_threads(count: int, work) -> list[BaseException]:
    """Run `work(number)` in so many threads at once; what they raised."""
    raised: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def waits(cache: KernelCache, count: int) -> None:
    """Until so many misses have begun."""
    while cache.get_cache_stats()["misses"] < count:
        threading.Event().wait(0.001)


def test_sixteen_threads_that_ask_for_one_kernel_cause_one_fetch(artifact):
    library = Shelf(artifact)
    library.gate = threading.Event()
    cache = KernelCache(library)
    found = []

    def ask(number: int) -> None:
        if number == 16:
            waits(cache, 16)
            library.gate.set()
        else:
            found.append(cache.load_kernel_sync(artifact.kernel_id))

    assert in_threads(17, ask) == []
    assert library.asks == [artifact.kernel_id]
    assert len(found) == 16
    assert all(one is found[0] for one in found)
    stats = cache.get_enhanced_stats()
    assert (stats["misses"], stats["fetched"], stats["joined"]) == (16, 1, 15)
    known = cache.metadata(artifact.kernel_id)
    assert known is not None
    assert known.accesses == 16


def test_what_came_between_a_miss_and_its_fetch_is_not_fetched_again(artifact):
    library = Shelf(artifact)
    cache = KernelCache(library)
    assert cache._holdings.hit(artifact.kernel_id) is None
    cache.put(artifact)
    outcome, leads = cache._fetching.run(artifact.kernel_id)
    assert (outcome.ending, outcome.artifact, leads) == ("joined", artifact, True)
    assert library.asks == []


def test_a_thousand_coroutines_cause_one_fetch_and_hold_up_nobody_else(kernels):
    library = Shelf(*kernels)
    cache = KernelCache(library)

    async def main() -> None:
        library.gate = threading.Event()
        first = [asyncio.create_task(cache.load_kernel(kernels[0].kernel_id)) for _ in range(1000)]
        await asyncio.sleep(0)
        await asyncio.to_thread(library.asked.wait)
        # All wait for the first; others are fetched meanwhile, and the loop goes on.
        gate, library.gate = library.gate, None
        rest = await asyncio.gather(*(cache.load_kernel(k.kernel_id) for k in kernels[1:]))
        assert [one.kernel_id for one in rest if one] == [k.kernel_id for k in kernels[1:]]
        assert not any(task.done() for task in first)
        gate.set()
        assert {one.kernel_id for one in await asyncio.gather(*first) if one} == {
            kernels[0].kernel_id
        }

    asyncio.run(main())
    assert sorted(library.asks) == sorted(k.kernel_id for k in kernels)
    stats = cache.get_enhanced_stats()
    assert stats["fetched"] == len(kernels)
    assert stats["joined"] == 999


def test_more_kernels_at_once_than_the_loops_own_threads(kernels):
    library = Shelf(*kernels)
    library.gate = threading.Event()
    cache = KernelCache(library)

    async def main() -> None:
        tasks = [asyncio.create_task(cache.load_kernel(k.kernel_id)) for k in kernels]
        # All twelve reach the library before any has its answer.
        while len(library.asks) < len(kernels):
            await asyncio.sleep(0.001)
        library.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_hit_needs_no_thread_and_no_turn_of_the_loop(artifact):
    cache = KernelCache()
    cache.put(artifact)
    coroutine = cache.load_kernel(artifact.kernel_id)
    with pytest.raises(StopIteration) as done:
        coroutine.send(None)
    assert done.value.value is cache.load_kernel_sync(artifact.kernel_id)


def test_the_asker_who_began_is_cancelled_and_the_others_get_it(artifact):
    library = Shelf(artifact)
    library.gate = threading.Event()
    cache = KernelCache(library)

    async def main() -> None:
        tasks = [asyncio.create_task(cache.load_kernel(artifact.kernel_id)) for _ in range(5)]
        await asyncio.to_thread(library.asked.wait)
        for cancelled in (tasks[0], tasks[3]):
            cancelled.cancel()
        await asyncio.gather(tasks[0], tasks[3], return_exceptions=True)
        assert tasks[0].cancelled()
        assert tasks[3].cancelled()
        library.gate.set()
        found = await asyncio.gather(*tasks[1:3], tasks[4])
        assert all(one is not None and one.kernel_id == artifact.kernel_id for one in found)

    asyncio.run(main())
    assert library.asks == [artifact.kernel_id]
    stats = cache.get_enhanced_stats()
    assert stats["interrupted"] == 2
    assert stats["misses"] == sum(stats[end] for end in ENDS) == 5


def test_all_askers_are_cancelled_and_it_comes_all_the_same(artifact):
    library = Shelf(artifact)
    library.gate = threading.Event()
    cache = KernelCache(library)

    async def main() -> None:
        task = asyncio.create_task(cache.load_kernel(artifact.kernel_id))
        await asyncio.to_thread(library.asked.wait)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    library.gate.set()
    cache.close()
    assert artifact.kernel_id in cache


def test_who_is_interrupted_at_the_work_leaves_it_to_the_next():
    flights: Flights[str, str] = Flights()
    began, go = threading.Event(), threading.Event()
    results = []

    def interrupted() -> str:
        began.set()
        assert go.wait(30)
        raise KeyboardInterrupt

    def first() -> None:
        with pytest.raises(KeyboardInterrupt):
            flights.run("k", interrupted)

    def second() -> None:
        results.append(flights.run("k", lambda: "made"))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert began.wait(30)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(30)
    assert results == [("made", True)]
    assert len(flights) == 0


def test_askers_of_what_cannot_be_had_get_each_an_error_of_their_own(artifact):
    library = Shelf()
    library.down, library.gate = DOWN, threading.Event()
    cache = KernelCache(library)

    def ask(number: int) -> None:
        if number == 8:
            waits(cache, 8)
            library.gate.set()
        else:
            cache.load_kernel_sync(artifact.kernel_id)

    raised = in_threads(9, ask)
    assert len(raised) == len({id(error) for error in raised}) == 8
    assert all(isinstance(error, LibraryError) for error in raised)
    stats = cache.get_enhanced_stats()
    # One who comes when the first has its answer asks again: a failure is not remembered.
    assert stats["failed"] == stats["library_failures"] == len(library.asks) >= 1
    assert stats["failed"] + stats["joined"] == 8


class Odd(Exception):
    """Made of other arguments than it keeps, so that it cannot be copied."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [(MemoryError("no room"), MemoryError, "no room"), (Odd("a", "b"), RuntimeError, "Odd: a b")],
)
def test_an_error_of_another_kind_is_each_askers_own_too(artifact, error, raised, message):
    def sizes(self):
        raise error

    # It cannot be kept, for a reason that is none of the library's.
    broken = dataclasses.replace(artifact, params=type("Params", (dict,), {"values": sizes})())
    library = Shelf(broken)
    library.gate = threading.Event()
    cache = KernelCache(library)

    def ask(number: int) -> None:
        if number == 4:
            waits(cache, 4)
            library.gate.set()
        else:
            cache.load_kernel_sync(artifact.kernel_id)

    found = in_threads(5, ask)
    assert len(found) == len({id(one) for one in found}) == 4
    for one in found:
        assert type(one) is raised
        assert str(one) == message
        assert one.__cause__ is error


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_sixteen_threads_at_random_and_every_byte_is_accounted_for(tmp_path, kernels, disk):
    library = Shelf(*kernels[:-2])
    sizes = {k.kernel_id: held_bytes(k) for k in kernels}
    limit = 4 * max(sizes.values())
    cache = KernelCache(
        library,
        max_cache_size_mb=limit / (1 << 20),
        max_entries=6,
        disk=tmp_path / "disk" if disk else None,
        remember_missing=2,
    )
    asks = [0] * 16

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(150):
            kernel, what = chance.choice(kernels), chance.random()
            if what < 0.7:
                asks[number] += 1
                found = cache.load_kernel_sync(kernel.kernel_id)
                assert found is None or found.data == kernel.data
            elif what < 0.8:
                cache.record_performance(kernel.kernel_id, chance.random())
            elif what < 0.9:
                cache.record_failure(kernel.kernel_id)
            elif what < 0.98:
                cache.put(kernels[chance.randrange(len(kernels) - 2)])
            else:
                cache.clear()

    assert in_threads(16, work) == []
    stats = cache.get_enhanced_stats()
    assert stats["hits"] + stats["misses"] == sum(asks)
    assert stats["misses"] == sum(stats[end] for end in ENDS)
    assert stats["library_asks"] == len(library.asks)
    assert stats["total_bytes"] == sum(sizes[key] for key in stats["cache_keys"]) <= limit
    assert stats["entries"] == len(stats["cache_keys"]) <= 6


def test_askers_with_an_asyncio_loop_and_askers_with_threads_share_a_fetch(artifact):
    library = Shelf(artifact)
    library.gate = threading.Event()
    cache = KernelCache(library)

    async def main() -> None:
        task = asyncio.create_task(cache.load_kernel(artifact.kernel_id))
        await asyncio.to_thread(library.asked.wait)
        thread = asyncio.create_task(asyncio.to_thread(cache.load_kernel_sync, artifact.kernel_id))
        await asyncio.to_thread(waits, cache, 2)
        library.gate.set()
        first, second = await asyncio.gather(task, thread)
        assert first is second is not None

    asyncio.run(main())
    assert library.asks == [artifact.kernel_id]


def test_get_kernel_bytes_are_the_file(artifact):
    cache = KernelCache(Shelf(artifact))
    assert asyncio.run(cache.get_kernel_bytes(artifact.kernel_id)) == artifact.data
    assert asyncio.run(cache.get_kernel_bytes("0" * 64)) is None


def test_a_cache_that_nobody_holds_goes_with_its_threads(artifact):
    before = set(threading.enumerate())
    cache = KernelCache(Shelf(artifact))
    asyncio.run(cache.load_kernel(artifact.kernel_id))
    cache.prefetch(["0" * 64])
    assert cache.wait_for_prefetches(30)
    threads = [t for t in threading.enumerate() if t not in before]
    assert {t.name for t in threads} == {"esper-fetch_0", "esper-prefetch"}
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_after_close_asks_are_still_answered(artifact):
    library = Shelf(artifact)
    cache = KernelCache(library)
    cache.close()
    assert asyncio.run(cache.load_kernel(artifact.kernel_id)) is not None
    cache.close()


def test_a_damaged_kernel_of_the_library_is_an_error_and_no_fault_of_the_guard(artifact):
    library = Shelf()
    library.down = ArtifactError("kernel 123 is damaged")
    passed = []

    def guard(call):
        passed.append(call())
        return passed[-1]

    cache = KernelCache(library, guard=guard)
    with pytest.raises(ArtifactError, match="kernel 123 is damaged"):
        cache.load_kernel_sync(artifact.kernel_id)
    assert isinstance(passed[0], ArtifactError)
    library.down = None
    assert cache.load_kernel_sync(artifact.kernel_id) is None
    assert passed[1] is None

"""Processes that are forked, as workers of a data loader are: nobody waits for the other's threads.

What hangs in a child is ended by an alarm, which its status shows.
"""

import asyncio
import fcntl
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable

import pytest

from esper.cache import DiskTier, KernelCache
from tests.esper.cache_kernels import Shelf, variant

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")


@pytest.fixture(scope="module")
def kernels(artifact):
    return [variant(artifact, number) for number in range(3)]


def fork(work: Callable[[], object]) -> int:
    """Begin work in a forked process; its id."""
    with warnings.catch_warnings():
        # jax says that it has threads; nothing of it runs in what is forked.
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid:
        return pid
    signal.alarm(10)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_folder_is_not_locked_for_the_life_of_a_forked_process(tmp_path, artifact):
    tier = DiskTier(tmp_path / "disk", 1 << 30)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with tier._locked():
            inside.set()
            assert leave.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(30)
    reading, writing = os.pipe()
    pid = fork(lambda: (os.close(writing), os.read(reading, 1)))
    leave.set()
    holder.join(30)
    with (tier.folder / "usage").open("rb+") as file:
        # Raises where another holds it.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert tier.put(artifact).kept
    # The child lived all the while.
    os.close(writing)
    assert status_of(pid) == 0
    os.close(reading)


def test_a_forked_process_asks_for_itself(kernels):
    first, second, third = kernels
    library = Shelf(*kernels)
    cache = KernelCache(library)
    # The threads that fetch for coroutines, and ahead, have begun; and two kernels are on the way.
    assert asyncio.run(cache.load_kernel(first.kernel_id)) is first
    library.gate = threading.Event()
    cache.prefetch([second.kernel_id, third.kernel_id])
    assert library.asked.wait(30)
    made = threading.Event()

    def slow(artifact):
        made.set()
        assert library.gate is None or library.gate.wait(30)
        return artifact

    def on_device():
        return cache.load_on_device(
            first.kernel_id, backend="b", device="d", load=slow, size=lambda _: 1
        )

    device = threading.Thread(target=on_device)
    device.start()
    assert made.wait(30)

    def child() -> None:
        library.gate = None
        # Nothing is under way here, and what is asked for comes.
        assert cache.wait_for_prefetches()
        assert cache.get_enhanced_stats()["prefetches_waiting"] == 0
        assert cache.load_kernel_sync(second.kernel_id) is second
        assert asyncio.run(cache.load_kernel(third.kernel_id)) is third
        assert on_device() is first
        cache.clear()
        assert cache.prefetch([second.kernel_id]) == 1
        assert cache.wait_for_prefetches()
        assert second.kernel_id in cache
        cache.close()

    assert status_of(fork(child)) == 0
    # And the parent's own go on.
    library.gate.set()
    device.join(30)
    assert cache.wait_for_prefetches(30)
    assert all(kernel.kernel_id in cache for kernel in kernels)
    cache.close()


def test_what_a_lock_guards_is_whole_in_a_forked_process(artifact):
    cache = KernelCache()
    cache.put(artifact)
    held = threading.Event()

    def change() -> None:
        with cache._holdings.lock:
            cache._holdings.counts.hits += 1
            held.set()
            time.sleep(0.05)
            cache._holdings.counts.misses += 1

    changing = threading.Thread(target=change)
    changing.start()
    assert held.wait(30)

    def child() -> None:
        stats = cache.get_cache_stats()
        assert (stats["hits"], stats["misses"]) == (1, 1)
        assert cache.load_kernel_sync(artifact.kernel_id) is artifact

    assert status_of(fork(child)) == 0
    changing.join(30)
    assert cache.load_kernel_sync(artifact.kernel_id) is artifact


def test_a_process_that_a_fetch_forks_ends_its_own_copy_of_it(artifact):
    pids = []

    class Forking(Shelf):
        def get(self, kernel_id):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pids.append(os.fork())
            signal.alarm(10 if pids == [0] else 0)
            return super().get(kernel_id)

    cache = KernelCache(Forking(artifact))
    try:
        found = cache.load_kernel_sync(artifact.kernel_id)
    finally:
        if pids == [0]:
            os._exit(0 if artifact.kernel_id in cache else 1)
    assert found is artifact
    assert status_of(pids[0]) == 0

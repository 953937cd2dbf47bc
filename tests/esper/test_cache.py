"""What a cache answers, what it says when it cannot, and what it counts."""

import asyncio
import copy
import gc
import pickle
import subprocess
import sys
import threading

import prometheus_client
import pytest
import torch
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from esper.cache import EnhancedKernelCache, KernelCache
from esper.cache._metadata import artifact_bytes
from esper.errors import InputError, KernelNotFoundError, LibraryError
from esper.execution import load_torch_kernel
from esper.urza import Library
from tests.esper.cache_kernels import DOWN, Shelf, held_bytes, variant

MISSING = "0" * 64


@pytest.fixture(scope="module")
def kernels(artifact):
    return [variant(artifact, number) for number in range(4)]


# ---- the library behind it ----


def test_a_kernel_of_the_library_is_fetched_once(library, artifact):
    cache = KernelCache(library)
    found = cache.load_kernel_sync(artifact.kernel_id)
    assert found is not None
    assert found.data == artifact.data
    assert cache.load_kernel_sync(artifact.kernel_id) is found
    assert asyncio.run(cache.load_kernel(artifact.kernel_id)) is found
    stats = cache.get_cache_stats()
    assert (stats["hits"], stats["misses"], stats["hit_rate"]) == (2, 1, 2 / 3)
    assert stats["cache_keys"] == [artifact.kernel_id]
    assert stats["total_size_mb"] == held_bytes(artifact) / (1 << 20)


def test_the_owners_names_are_one_class():
    assert EnhancedKernelCache is KernelCache
    cache = KernelCache(max_cache_size_mb=512, max_entries=128)
    assert set(cache.get_cache_stats()) == {
        "entries", "total_size_mb", "max_size_mb", "max_entries", "hits", "misses", "evictions",
        "hit_rate", "cache_keys",
    }  # fmt: skip
    assert set(cache.get_enhanced_stats()) >= {
        *cache.get_cache_stats(), "metadata_cache_size", "compatibility_checks",
        "compatibility_failures", "compatibility_rate", "total_estimated_memory_mb",
        "average_kernel_parameters",
    }  # fmt: skip


def test_what_an_entry_costs_is_every_byte_that_it_holds(artifact, kernels):
    for kernel in (artifact, *kernels, variant(artifact, 9, padding=1234, torch=False)):
        assert artifact_bytes(kernel) == held_bytes(kernel)


def test_what_is_nowhere_is_none_and_no_failure(artifact):
    cache = KernelCache(Shelf(artifact))
    assert cache.load_kernel_sync(MISSING) is None
    assert asyncio.run(cache.load_kernel(MISSING)) is None
    stats = cache.get_enhanced_stats()
    assert (stats["not_found"], stats["failed"], stats["library_failures"]) == (2, 0, 0)
    assert cache.events() == []


def test_without_a_library_there_is_what_was_put(artifact):
    cache = KernelCache()
    assert cache.load_kernel_sync(artifact.kernel_id) is None
    assert cache.put(artifact) == artifact.kernel_id
    assert cache.load_kernel_sync(artifact.kernel_id) is artifact
    assert artifact.kernel_id in cache
    assert MISSING not in cache
    cache.clear()
    assert len(cache) == 0
    assert cache.load_kernel_sync(artifact.kernel_id) is None


def test_an_absence_is_remembered_for_so_many_asks_and_until_it_is_put(kernels):
    library = Shelf()
    cache = KernelCache(library, remember_missing=3)
    for _ in range(8):
        assert cache.load_kernel_sync(kernels[0].kernel_id) is None
    # Asked at the first and the fifth.
    assert len(library.asks) == 2
    cache.put(kernels[0])
    cache.clear()
    library.kernels[kernels[0].kernel_id] = kernels[0]
    assert cache.load_kernel_sync(kernels[0].kernel_id) is not None


def test_a_new_library_is_asked_for_what_the_one_before_did_not_have(artifact):
    before, after = Shelf(), Shelf(artifact)
    cache = KernelCache(before, remember_missing=5)
    assert cache.load_kernel_sync(artifact.kernel_id) is None
    cache.library = after
    assert cache.load_kernel_sync(artifact.kernel_id) is artifact
    assert cache.library is after


def test_what_an_old_library_answers_late_says_nothing_of_the_new_one(artifact):
    before, after = Shelf(), Shelf(artifact)
    before.gate = threading.Event()
    cache = KernelCache(before, remember_missing=5)
    cache.prefetch([artifact.kernel_id])
    assert before.asked.wait(30)
    cache.library = after
    before.gate.set()
    assert cache.wait_for_prefetches(30)
    assert artifact.kernel_id not in cache
    assert cache.load_kernel_sync(artifact.kernel_id) is artifact
    cache.close()


@pytest.mark.parametrize(
    ("down", "reason"),
    [
        (DOWN, "it: the database is locked. At hand:"),
        (
            OSError(5, "Input/output error"),
            r"it: OSError: \[Errno 5\] Input/output error. At hand:",
        ),
        (TimeoutError("no answer in 5 s"), "it: TimeoutError: no answer in 5 s. At hand:"),
    ],
)
def test_hits_go_on_while_the_library_is_down(tmp_path, kernels, down, reason):
    library = Shelf(*kernels)
    cache = KernelCache(library, max_entries=1, disk=tmp_path / "disk")
    for kernel in kernels[:2]:
        cache.load_kernel_sync(kernel.kernel_id)
    library.down = down
    # From memory, and from the disk.
    for kernel in (kernels[1], kernels[0]):
        assert cache.load_kernel_sync(kernel.kernel_id) is not None
    expected = (
        rf"kernel {kernels[2].kernel_id[:12]} is not in the cache, and the library could not be"
        rf" asked for {reason} 1 in memory, and what is in {tmp_path}/disk\. Use one of those, or"
        " ask again when the library answers"
    )
    for _ in range(2):
        with pytest.raises(LibraryError, match=expected) as caught:
            cache.load_kernel_sync(kernels[2].kernel_id)
        assert not isinstance(caught.value, KernelNotFoundError)
    with pytest.raises(LibraryError, match=expected):
        asyncio.run(cache.load_kernel(kernels[2].kernel_id))
    stats = cache.get_enhanced_stats()
    assert (stats["failed"], stats["library_failures"], stats["not_found"]) == (3, 3, 0)
    assert {event.kind for event in cache.events()} == {"library"}
    library.down = None
    assert cache.load_kernel_sync(kernels[2].kernel_id) is not None


def test_a_guard_stands_before_the_library_and_hears_of_failures_alone(kernels):
    library, seen, closed = Shelf(kernels[0]), [], [False]

    def guard(call):
        if closed[0]:
            raise RuntimeError("the circuit is open")
        try:
            result = call()
        except Exception:
            seen.append("failure")
            raise
        seen.append("answer")
        return result

    cache = KernelCache(library, guard=guard)
    assert cache.load_kernel_sync(kernels[0].kernel_id) is not None
    assert cache.load_kernel_sync(MISSING) is None
    library.down = DOWN
    with pytest.raises(LibraryError, match="the database is locked"):
        cache.load_kernel_sync(MISSING)
    assert seen == ["answer", "answer", "failure"]
    closed[0] = True
    with pytest.raises(LibraryError, match="RuntimeError: the circuit is open"):
        cache.load_kernel_sync(MISSING)
    assert len(library.asks) == 3
    assert cache.load_kernel_sync(kernels[0].kernel_id) is not None


def test_a_library_that_gives_another_kernel_is_not_believed(kernels):
    library = Shelf()
    library.kernels[kernels[0].kernel_id] = kernels[1]
    cache = KernelCache(library)
    with pytest.raises(LibraryError, match=f"it gave {kernels[1].kernel_id[:12]} for kernel"):
        cache.load_kernel_sync(kernels[0].kernel_id)
    library.kernels[kernels[0].kernel_id] = "kernel"  # type: ignore[assignment]
    with pytest.raises(LibraryError, match="it gave a str for kernel"):
        cache.load_kernel_sync(kernels[0].kernel_id)
    assert len(cache) == 0


def test_a_listener_that_fails_ends_nothing(kernels):
    library = Shelf()
    library.down = DOWN

    def listener(event):
        raise ValueError(event.kind)

    cache = KernelCache(library, on_event=listener)
    with pytest.raises(LibraryError):
        cache.load_kernel_sync(MISSING)
    assert cache.get_enhanced_stats()["listener_failures"] == 1
    assert len(cache.events()) == 1


@pytest.mark.parametrize("asks", ["sync", "async"])
def test_a_listener_may_ask_for_the_kernel_that_it_is_told_of(tmp_path, artifact, asks):
    told, found = [], []

    def listener(event):
        told.append(event.kind)
        found.append(cache.load_kernel_sync(event.kernel_id))

    cache = KernelCache(Shelf(artifact), disk=tmp_path / "disk", on_event=listener)
    cache.put(artifact)
    cache.clear()
    (tmp_path / "disk" / f"{artifact.kernel_id}.zst").write_bytes(b"x")

    def ask():
        if asks == "sync":
            return cache.load_kernel_sync(artifact.kernel_id)
        return asyncio.run(cache.load_kernel(artifact.kernel_id))

    # It would keep the process, if it hung.
    asking = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    asking.start()
    asking.join(20)
    assert told == ["damaged"]
    assert found == [artifact, artifact]
    assert cache.get_enhanced_stats()["listener_failures"] == 0


def test_what_a_listener_brings_about_is_kept_and_not_told_to_it_again(tmp_path):
    library, told = Shelf(), []
    library.down = DOWN

    def listener(event):
        told.append(event.kind)
        cache.load_kernel_sync(event.kernel_id)

    cache = KernelCache(library, on_event=listener)
    with pytest.raises(LibraryError):
        cache.load_kernel_sync(MISSING)
    assert told == ["library"]
    assert [event.kind for event in cache.events()] == ["library", "library"]
    assert cache.get_enhanced_stats()["listener_failures"] == 1


def test_only_so_many_events_are_kept():
    library = Shelf()
    library.down = DOWN
    cache = KernelCache(library)
    for number in range(300):
        with pytest.raises(LibraryError):
            cache.load_kernel_sync(f"{number:064}")
    assert [event.kernel_id for event in cache.events()] == [f"{n:064}" for n in range(44, 300)]


def test_training_a_kernel_does_not_change_what_is_kept(artifact):
    cache = KernelCache()
    cache.put(variant(artifact, 3))
    (kernel_id,) = cache.get_cache_stats()["cache_keys"]
    found = cache.load_kernel_sync(kernel_id)
    assert found is not None
    before = {name: p.copy() for name, p in found.params.items()}
    layer = esper_layer(found)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(4, 2)).square().sum().backward()
        optimizer.step()
    own = [p for name, p in layer.named_parameters() if name not in ("weight", "bias")]
    trained = {tuple(p.shape): p.detach().numpy() for p in own}
    assert any((trained[p.shape] != p).any() for p in before.values())
    again = cache.load_kernel_sync(kernel_id)
    assert again is found
    assert all((again.params[name] == before[name]).all() for name in before)


def esper_layer(found):
    from esper.execution import KasminaLayer

    torch.manual_seed(0)
    layer = KasminaLayer(2, 8, num_seeds=1)
    layer.load_kernel_sync(0, load_torch_kernel(found))
    layer.set_seed_alpha(0, 0.5)
    return layer


# ---- devices ----


def test_what_was_made_of_a_kernel_is_made_once_a_device(kernels):
    cache = KernelCache(Shelf(*kernels), max_device_mb=3 / (1 << 10))
    made = []

    def load(artifact):
        made.append(artifact.kernel_id)
        return [artifact.kernel_id]

    def on(kernel, device, backend="torch", size=1024):
        return cache.load_on_device(
            kernel.kernel_id, backend=backend, device=device, load=load, size=lambda _: size
        )

    first = on(kernels[0], torch.device("cpu"))
    assert first == [kernels[0].kernel_id]
    assert on(kernels[0], "cpu") is first
    assert on(kernels[0], "cuda:0") is not first
    assert on(kernels[0], "cpu", backend="jax") is not first
    assert len(made) == 3
    stats = cache.get_enhanced_stats()
    assert stats["devices"] == {
        "cpu": {"entries": 2, "bytes": 2048},
        "cuda:0": {"entries": 1, "bytes": 1024},
    }
    assert (stats["device_hits"], stats["device_misses"]) == (1, 3)
    # Three fit; the one used longest ago makes room.
    on(kernels[1], "cpu")
    on(kernels[0], "cpu")
    on(kernels[2], "cpu")
    stats = cache.get_enhanced_stats()
    assert (stats["device_bytes"], stats["device_evictions"]) == (4096, 1)
    made.clear()
    assert on(kernels[0], "cpu") is first
    on(kernels[0], "cpu", backend="jax")
    assert made == [kernels[0].kernel_id]
    # What is larger than the limit is given, and not kept.
    on(kernels[3], "cpu", size=4096)
    on(kernels[3], "cpu", size=4096)
    assert cache.get_enhanced_stats()["device_too_large"] == 2
    # Out of memory: all of one device goes, and nothing else.
    assert cache.drop_device("cuda:0") == 1024
    assert cache.drop_device("cuda:0") == 0
    stats = cache.get_enhanced_stats()
    assert (stats["device_bytes"], stats["device_dropped"]) == (3072, 1)
    assert list(stats["devices"]) == ["cpu"]
    cache.clear()
    assert cache.get_enhanced_stats()["device_bytes"] == 0


def test_a_poor_kernel_goes_from_a_device_before_better_ones(kernels):
    cache = KernelCache(Shelf(*kernels), max_device_mb=2 / (1 << 20))

    def on(kernel):
        return cache.load_on_device(
            kernel.kernel_id, backend="b", device="d", load=lambda a: a.kernel_id, size=lambda _: 1
        )

    for kernel in kernels[:2]:
        on(kernel)
    cache.record_performance(kernels[0].kernel_id, 0.9)
    cache.record_failure(kernels[1].kernel_id)
    on(kernels[2])
    before = cache.get_enhanced_stats()["device_hits"]
    on(kernels[0])
    assert cache.get_enhanced_stats()["device_hits"] == before + 1


def test_asks_that_a_device_answers_count_as_accesses(artifact):
    cache = KernelCache()
    cache.put(artifact)

    def on():
        return cache.load_on_device(
            artifact.kernel_id, backend="b", device="d", load=lambda a: a, size=lambda _: 1
        )

    for _ in range(4):
        on()
    known = cache.metadata(artifact.kernel_id)
    assert known is not None
    assert (known.accesses, known.last_access) == (4, 4)


def test_what_cannot_be_made_is_an_error_and_is_tried_again(kernels):
    cache = KernelCache(Shelf(*kernels))

    def on(kernel_id, load, size):
        return cache.load_on_device(kernel_id, backend="b", device="d", load=load, size=size)

    def fails(artifact):
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError, match="out of memory"):
        on(kernels[0].kernel_id, fails, lambda _: 1)
    for size in (-1, 1.5, None, True):
        with pytest.raises(InputError, match="must be a whole number of bytes, at least 0, got"):
            on(kernels[0].kernel_id, lambda a: a, lambda _, size=size: size)
    assert cache.get_enhanced_stats()["device_entries"] == 0
    assert on(kernels[0].kernel_id, lambda a: a, lambda _: 1) is not None
    assert on(MISSING, fails, lambda _: 1) is None


def test_many_askers_for_one_device_make_it_once(artifact):
    cache = KernelCache()
    cache.put(artifact)
    gate, made = threading.Event(), []

    def load(found):
        made.append(found)
        assert gate.wait(30)
        return object()

    results = []

    def ask():
        results.append(
            cache.load_on_device(
                artifact.kernel_id, backend="b", device="d", load=load, size=lambda _: 1
            )
        )

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while cache.get_enhanced_stats()["device_misses"] < 8:
        threading.Event().wait(0.001)
    gate.set()
    for thread in threads:
        thread.join(30)
    assert len(made) == 1
    assert len({id(result) for result in results}) == 1


# ---- limits, copies, statistics ----


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("max_entries", -1, "max_entries must be a whole number of at least 0, got -1"),
        ("max_entries", 1.5, "max_entries must be a whole number of at least 0, got 1.5"),
        ("max_entries", True, "max_entries must be a whole number of at least 0, got True"),
        ("max_cache_size_mb", -0.5, "max_cache_size_mb must be a number of at least 0, got -0.5"),
        ("max_cache_size_mb", float("nan"), "must be a number of at least 0, got nan"),
        ("max_cache_size_mb", float("inf"), "a finite number of MB, got inf"),
        ("max_device_mb", "1", "max_device_mb must be a number of at least 0, got '1'"),
        ("max_fetches", 0, "max_fetches must be a whole number of at least 1, got 0"),
        ("prefetch", None, "prefetch must be a whole number of at least 0, got None"),
    ],
)
def test_limits_that_are_none(limit, value, message):
    with pytest.raises(InputError, match=message):
        KernelCache(**{limit: value})


def test_a_cache_of_nothing_still_answers(kernels):
    for none in ({"max_entries": 0}, {"max_cache_size_mb": 0}):
        cache = KernelCache(Shelf(*kernels), max_metadata=0, **none)
        for kernel in kernels:
            assert cache.load_kernel_sync(kernel.kernel_id) is kernel
        stats = cache.get_enhanced_stats()
        assert (stats["entries"], stats["total_bytes"]) == (0, 0)
        # They are larger than nothing, but not larger than what no number of them may fill.
        assert stats["too_large"] == (4 if "max_cache_size_mb" in none else 0)
        assert stats["metadata_cache_size"] == 0


def test_what_is_no_artifact_is_not_put(artifact):
    cache = KernelCache()
    with pytest.raises(InputError, match="a cache holds artifacts, got a bytes: read one by"):
        cache.put(artifact.data)


@pytest.mark.parametrize("odd", [7, None, [], b"7"])
def test_what_is_no_id_is_not_asked_for(odd):
    library = Shelf()
    cache = KernelCache(library)
    for ask in (
        cache.load_kernel_sync,
        cache.metadata,
        cache.record_failure,
        lambda odd: cache.record_performance(odd, 0.5),
        lambda odd: cache.prefetch([odd]),
        lambda odd: asyncio.run(cache.load_kernel(odd)),
        lambda odd: asyncio.run(cache.load_kernel_with_validation(odd, (1, 2), "cpu")),
        lambda odd: cache.load_on_device(
            odd, backend="b", device="d", load=lambda a: a, size=lambda _: 1
        ),
    ):
        with pytest.raises(InputError, match=r"a kernel is asked for by its id, a text, got ") as e:
            ask(odd)
        assert str(e.value).endswith(f" got {odd!r}, a {type(odd).__name__}")
        assert e.value.__cause__ is None
    assert library.asks == []
    stats = cache.get_enhanced_stats()
    assert (stats["misses"], stats["device_misses"]) == (0, 0)


def test_a_copy_is_empty_and_has_the_same_limits(tmp_path, kernels):
    library, told = Shelf(*kernels), []
    cache = KernelCache(
        library, max_cache_size_mb=0.5, max_entries=3, max_device_mb=7, disk=tmp_path / "disk",
        max_metadata=5, remember_missing=2, on_event=told.append,
    )  # fmt: skip
    cache.load_kernel_sync(kernels[0].kernel_id)
    for make in (copy.copy, copy.deepcopy):
        other = make(cache)
        assert (len(other), other.limits) == (0, cache.limits)
        assert other.library is library
        assert other.get_cache_stats()["misses"] == 0
        assert other.load_kernel_sync(kernels[0].kernel_id) is not None
        assert other.get_enhanced_stats()["disk_hits"] == 1
    other = pickle.loads(pickle.dumps(cache))
    assert (len(other), other.limits) == (0, cache.limits)
    assert other.load_kernel_sync(kernels[0].kernel_id) is not None
    with pytest.raises(LibraryError, match=r"left behind when the cache was pickled: give it one"):
        other.load_kernel_sync(kernels[1].kernel_id)
    other.library = library
    assert other.load_kernel_sync(kernels[1].kernel_id) is not None
    alone = pickle.loads(pickle.dumps(KernelCache()))
    assert alone.load_kernel_sync(kernels[1].kernel_id) is None


def numbers(stats):
    return {name: value for name, value in stats.items() if isinstance(value, int | float)}


def test_statistics_of_prometheus_are_the_caches_and_all_of_them(tmp_path, kernels):
    registry = prometheus_client.CollectorRegistry()
    cache = KernelCache(Shelf(*kernels), registry=registry, name="a", disk=tmp_path / "disk")
    other = KernelCache(Shelf(*kernels), registry=registry, name="b")
    for _ in range(3):
        cache.load_kernel_sync(kernels[0].kernel_id)

    def samples(name):
        # Which refuses a family that comes twice, and a sample that does.
        families = text_string_to_metric_families(generate_latest(registry).decode())
        return {
            sample.name.removeprefix("esper_kernel_cache_").removesuffix("_total"): sample.value
            for family in families
            for sample in family.samples
            if sample.labels == {"cache": name}
        }

    assert samples("a") == numbers(cache.get_enhanced_stats())
    assert samples("b") == numbers(other.get_enhanced_stats())
    assert samples("a")["disk_entries"] == samples("a")["entries"] == 1
    assert "disk_bytes" not in samples("b")
    hits = registry.get_sample_value("esper_kernel_cache_hits_total", {"cache": "a"})
    assert hits == 2
    del other
    gc.collect()
    assert samples("b") == {}
    assert samples("a")["hits"] == 2


def test_caches_of_one_registry_have_names_of_their_own(kernels):
    registry = prometheus_client.CollectorRegistry()
    cache = KernelCache(registry=registry)
    expected = (
        "has a cache named 'kernels' already: give this one another name, by name=, or let go"
    )
    with pytest.raises(InputError, match=expected):
        KernelCache(registry=registry)
    KernelCache(registry=prometheus_client.CollectorRegistry())
    del cache
    gc.collect()
    again = KernelCache(registry=registry)
    again.put(kernels[0])
    name = "esper_kernel_cache_entries"
    assert registry.get_sample_value(name, {"cache": "kernels"}) == 1


def test_all_statistics_are_of_one_moment(kernels):
    cache = KernelCache()
    cache.put(kernels[0])
    lock = cache._holdings.lock
    others = iter(kernels[1:])

    class Contended:
        """The same lock, and whenever it is free another comes who changes something."""

        def __enter__(self):
            lock.acquire()

        def __exit__(self, *_):
            lock.release()
            cache._holdings.lock = lock
            if (kernel := next(others, None)) is not None:
                cache.put(kernel)
            cache._holdings.lock = self

    cache._holdings.lock = Contended()  # type: ignore[assignment]
    stats = cache.get_enhanced_stats()
    assert stats["cache_keys"] == [kernels[0].kernel_id]
    assert stats["total_bytes"] == stats["total_size_mb"] * (1 << 20) == held_bytes(kernels[0])
    assert stats["entries"] == stats["metadata_cache_size"] == 1


def test_a_cache_says_nothing_to_the_registry_of_all_unless_asked(artifact):
    KernelCache().put(artifact)
    text = prometheus_client.generate_latest().decode()
    assert "esper_kernel_cache" not in text


def test_importing_the_cache_imports_no_torch():
    script = "import sys, esper.cache; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_the_library_of_a_folder_that_vanishes(tmp_path, artifact):
    library = Library(tmp_path / "library")
    library.put(artifact)
    cache = KernelCache(library)
    cache.load_kernel_sync(artifact.kernel_id)
    path = library.folder / "kernels" / artifact.kernel_id[:2]
    for file in path.iterdir():
        file.unlink()
    assert cache.load_kernel_sync(artifact.kernel_id) is not None
    cache.clear()
    assert cache.load_kernel_sync(artifact.kernel_id) is None

"""What keeping kernels at hand costs: `python -m experiments.bench.cache`.

A hit in memory against a bare dict and an LRU mapping of cachetools, neither of
which locks, counts or measures; a miss that the disk tier or the local library
answers against the same bytes read and verified by hand; and what eviction and a
search cost among ten thousand kernels. Misses are all of what a caller waits for:
reading, verifying, finding out what the kernel is as if its program had never been
seen, and where so told, the write to the disk tier with its fsync.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import cachetools
import numpy as np
import zstandard

from esper.artifacts import Artifact, read_artifact
from esper.cache import DiskTier, KernelCache, KernelMetadata, _metadata
from esper.cache._index import Index, Requirements
from esper.cache._tier import GRADES, Tier
from esper.contracts import KernelSignature
from esper.urza import Library
from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Call, Sampling, contest
from experiments.bench._results import Check, Figure, Results


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets of the design (§8)."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    features: int = 256
    """Of the kernel's input and output."""
    width: int = 64
    entries: int = 10_000
    target_hit_microseconds: float = 2.0
    target_miss_milliseconds: float = 20.0
    earlier_hit_microseconds: float = 1.28
    """Of the earlier attempt, which held no lock and looked at no file."""
    seed: int = 0


def one_kernel(settings: Settings) -> Artifact:
    """A residual network of two layers."""
    from esper.tezzeret import compile_blueprint, load_blueprint

    shape = (settings.features,)
    return compile_blueprint(
        load_blueprint("residual_mlp"),
        KernelSignature(input_shape=shape, output_shape=shape),
        sizes={"width": settings.width},
        init_seed=settings.seed,
    )


def awaited(make: Call) -> object:
    """What a coroutine returns that never waits."""
    coroutine: Any = make()
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a hit waited for the event loop")


def measure_hits(results: Results, settings: Settings, artifact: Artifact) -> None:
    """An ask that memory answers."""
    name, key = "hit in memory", artifact.kernel_id
    if not results.wants(name):
        return
    target = settings.target_hit_microseconds
    limits: dict[str, dict[str, float | None]] = {
        "cachetools.LRUCache": {},
        "KernelCache": {"µs": target},
        "KernelCache, awaited": {"µs": target},
        "KernelCache, looking ahead": {"µs": target},
    }

    def build() -> Mapping[str, Call]:
        caches = [KernelCache(prefetch=ahead) for ahead in (0, 1)]
        for cache in caches:
            cache.put(artifact)
        lru: cachetools.LRUCache[str, Artifact] = cachetools.LRUCache(1 << 29, lambda a: 1)
        lru[key] = artifact
        bare, again = {key: artifact}, {key: artifact}
        asynchronous: Any = partial(caches[0].load_kernel, key)
        return {
            "dict": partial(bare.get, key),
            "again": partial(again.get, key),
            "cachetools.LRUCache": partial(lru.__getitem__, key),
            "KernelCache": partial(caches[0].load_kernel_sync, key),
            "KernelCache, awaited": partial(awaited, asynchronous),
            "KernelCache, looking ahead": partial(caches[1].load_kernel_sync, key),
        }

    given = {variant: call() is artifact for variant, call in build().items()}
    results.checks.append(
        Check(f"{name}: gives the kernel", "all", "all" if all(given.values()) else f"{given}")
    )
    rows = contest(name, dict.fromkeys(limits), build, settings.sampling)
    results.rows += rows
    for row in rows:
        results.figures.append(
            Figure(
                f"{name}: {row.variant}",
                row.candidate.microseconds,
                "µs",
                limits[row.variant].get("µs"),
            )
        )


def measure_misses(results: Results, settings: Settings, artifact: Artifact, folder: Path) -> None:
    """Asks that the disk tier and the library answer; nothing is kept in memory."""
    key = artifact.kernel_id
    library = Library(folder / "library")
    library.put(artifact)
    kept = DiskTier(folder / "kept", 1 << 30)
    kept.put(artifact)
    path = kept.folder / f"{key}.zst"
    blob = library.folder / "kernels" / key[:2] / f"{key}.kernel"
    from_disk = KernelCache(max_entries=0, disk=kept.folder)
    from_library = KernelCache(library, max_entries=0)
    through = KernelCache(library, max_entries=0, disk=folder / "through")
    written = folder / "through" / f"{key}.zst"

    def unpacked() -> Artifact:
        return read_artifact(zstandard.ZstdDecompressor().decompress(path.read_bytes()), key)

    def plain() -> Artifact:
        return read_artifact(blob.read_bytes(), key)

    def unseen(cache: KernelCache) -> Artifact | None:
        # Otherwise all misses but the first would know what the kernel is.
        _metadata._flops.cache_clear()
        _metadata._platforms.cache_clear()
        return cache.load_kernel_sync(key)

    def written_too() -> Artifact | None:
        written.unlink(missing_ok=True)
        return unseen(through)

    target = settings.target_miss_milliseconds
    for name, by_hand, ours, limit in (
        ("miss, from the disk tier", unpacked, partial(unseen, from_disk), None),
        ("miss, from the library", plain, partial(unseen, from_library), target),
        ("miss, from the library, kept on the disk", plain, written_too, target),
    ):
        if not results.wants(name):
            continue
        found = ours()
        same = found is not None and found.data == artifact.data
        results.checks.append(Check(f"{name}: gives the kernel", "yes", "yes" if same else "no"))
        variants: dict[str, Call] = {"by hand": by_hand, "again": by_hand, "KernelCache": ours}
        (row,) = contest(name, {"KernelCache": None}, lambda v=variants: v, settings.sampling)
        results.rows.append(row)
        results.figures.append(Figure(name, row.candidate.microseconds / 1e3, "ms", limit))


def measure_many(results: Results, settings: Settings) -> None:
    """Eviction and a search among many kernels."""
    many = settings.entries
    random = np.random.default_rng(settings.seed)
    grades = [int(grade) for grade in random.integers(0, GRADES + 1, 2 * many)]
    name = f"a put that evicts one of {many:,}"
    if results.wants(name):

        def build() -> Mapping[str, Call]:
            def lru() -> Call:
                own: cachetools.LRUCache[int, None] = cachetools.LRUCache(many)
                own.update(dict.fromkeys(range(many)))
                keys = count(many)
                return lambda: own.__setitem__(next(keys), None)

            tier: Tier[int, None] = Tier(many, many)
            for key in range(many):
                tier.put(key, None, 1, grades[key])
            keys = count(many)

            def put() -> object:
                key = next(keys)
                return tier.put(key, None, 1, grades[key % len(grades)])

            return {"cachetools.LRUCache": lru(), "again": lru(), "tier": put}

        (row,) = contest(name, {"tier": None}, build, settings.sampling)
        results.rows.append(row)
        results.figures.append(Figure(name, row.candidate.microseconds, "µs"))
    name = "misses of 10,000 asks, 128 of 1,000 kernels kept"
    if results.wants(name):
        rarity = 1.0 / np.arange(1, 1001) ** 1.2
        asks = random.choice(1000, 10_000, p=rarity / rarity.sum()).tolist()
        # Where nothing was measured, what goes is what was used longest ago.
        results.checks.append(Check(name, str(misses_of_lru(asks)), str(misses_of_tier(asks))))
    name = f"find_compatible_kernels, 100 of {many:,} fit"
    if results.wants(name):
        index = Index(many)
        index.note_all(known(number, many) for number in range(many))
        wanted = Requirements.of((32, 1), "cpu", None, "float32", (32, 1), None, None)
        found = index.fitting(wanted)
        results.checks.append(Check(f"{name}: found", "100", str(len(found))))
        again: dict[str, Call] = dict.fromkeys(("a", "b"), partial(index.fitting, wanted))
        (row,) = contest(name, {"b": None}, lambda: {"a": again["a"], **again}, settings.sampling)
        results.figures.append(Figure(name, row.candidate.microseconds / 1e3, "ms"))


def misses_of_tier(asks: list[int], kept: int = 128) -> int:
    """Asks that a tier has no answer to, which then gets one."""
    tier: Tier[int, None] = Tier(kept, kept)
    misses = 0
    for key in asks:
        if tier.get(key) is None:
            misses += 1
            tier.put(key, None, 1, GRADES // 2)
    return misses


def misses_of_lru(asks: list[int], kept: int = 128) -> int:
    """The same of cachetools' mapping."""
    lru: cachetools.LRUCache[int, int] = cachetools.LRUCache(kept)
    misses = 0
    for key in asks:
        if lru.get(key) is None:
            misses += 1
            lru[key] = key + 1
    return misses


def known(number: int, many: int) -> KernelMetadata:
    """A kernel of one of many shapes, a hundred of each."""
    features = (1 + number // 100,)
    return KernelMetadata(
        kernel_id=f"{number:064}",
        blueprint=f"one of {many}",
        birth="zero",
        confidence=0.5,
        input_shape=features,
        output_shape=features,
        dtype="float32",
        parameter_count=number,
        parameter_bytes=4 * number,
        size_bytes=10 * number,
    )


def measure(settings: Settings, only: str = "") -> Results:
    """Hits, misses, evictions and a search."""
    results = Results(only=only)
    artifact = one_kernel(settings)
    results.notes.append(
        f"The kernel's file has {len(artifact.data):,} bytes. The earlier attempt took"
        f" {settings.earlier_hit_microseconds} µs for a hit."
    )
    measure_hits(results, settings, artifact)
    with tempfile.TemporaryDirectory() as folder:
        measure_misses(results, settings, artifact, Path(folder))
    measure_many(results, settings)
    return results


BENCHMARK = Benchmark(
    name="cache",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="Kernels at hand: median of paired ratios (interquartile range)",
    names=("by hand", "ours"),
    packages=("esper-morphogenetic", "numpy", "jax", "torch", "cachetools", "zstandard"),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

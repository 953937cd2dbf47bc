"""The cache with real kernels against a model of it: a dict of kernels and a list of ids."""

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from esper.cache import KernelCache
from esper.errors import LibraryError
from tests.esper.cache_kernels import DOWN, Shelf, held_bytes, variant

KERNELS = 8
MAX_ENTRIES = 4
MAX_METADATA = 2
REMEMBERED = 2


@dataclasses.dataclass
class Seen:
    performance: float = 0.5
    failures: int = 0
    accesses: int = 0
    last_access: int = 0

    def grade(self) -> int:
        rate = min(1.0, self.failures / max(1, self.accesses))
        return round(64 * self.performance * (1.0 - rate))


def machine(kernels: list) -> type[RuleBasedStateMachine]:
    ids = [kernel.kernel_id for kernel in kernels]
    sizes = {kernel.kernel_id: held_bytes(kernel) for kernel in kernels}
    # Room for about three of the smaller ones; the last is larger than all of it.
    max_bytes = sum(sorted(sizes.values())[2:5])
    assert sizes[ids[-1]] > max_bytes
    some = st.sampled_from(ids)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.library = Shelf(*kernels[: KERNELS // 2])
            self.cache = KernelCache(
                self.library,
                max_cache_size_mb=max_bytes / (1 << 20),
                max_entries=MAX_ENTRIES,
                max_metadata=MAX_METADATA,
                remember_missing=REMEMBERED,
            )
            self.memory: dict[str, int] = {}  # id to when it was last touched
            self.seen: dict[str, Seen] = {}
            self.others: list[str] = []
            self.absent: dict[str, int] = {}
            self.now = self.asks = 0
            self.counts = dict.fromkeys(
                (
                    "hits", "misses", "fetched", "not_found", "failed", "library_asks",
                    "library_failures", "evictions_bytes", "evictions_entries", "too_large",
                ),
                0,
            )  # fmt: skip

        # ---- the model ----

        def used(self) -> int:
            return sum(sizes[kernel_id] for kernel_id in self.memory)

        def worth(self, kernel_id: str) -> tuple[Fraction, int]:
            touched = self.memory[kernel_id]
            return Fraction(self.seen[kernel_id].grade()) / (self.now - touched + 1), touched

        def leaves(self, kernel_id: str) -> None:
            if kernel_id in self.others:
                self.others.remove(kernel_id)
            self.others.append(kernel_id)
            while len(self.others) > MAX_METADATA:
                del self.seen[self.others.pop(0)]

        def keeps(self, kernel_id: str) -> None:
            self.absent.pop(kernel_id, None)
            if kernel_id in self.memory:
                self.now += 1
                self.memory[kernel_id] = self.now
                return
            self.seen.setdefault(kernel_id, Seen())
            if sizes[kernel_id] > max_bytes:
                self.counts["too_large"] += 1
                self.leaves(kernel_id)
                return
            if kernel_id in self.others:
                self.others.remove(kernel_id)
            self.now += 1
            while True:
                if len(self.memory) >= MAX_ENTRIES:
                    reason = "evictions_entries"
                elif self.used() + sizes[kernel_id] > max_bytes:
                    reason = "evictions_bytes"
                else:
                    break
                worst = min(self.memory, key=self.worth)
                del self.memory[worst]
                self.leaves(worst)
                self.counts[reason] += 1
            self.memory[kernel_id] = self.now

        def asked(self, kernel_id: str) -> None:
            self.asks += 1
            if kernel_id in self.seen:
                self.seen[kernel_id].accesses += 1
                self.seen[kernel_id].last_access = self.asks

        # ---- what is done to both ----

        @rule(kernel_id=some)
        def load(self, kernel_id: str) -> None:
            if kernel_id in self.memory:
                self.now += 1
                self.memory[kernel_id] = self.now
                self.counts["hits"] += 1
                expected = "kernel"
            else:
                self.counts["misses"] += 1
                left = self.absent.pop(kernel_id, 0)
                if left:
                    self.absent[kernel_id] = left - 1
                    expected = "not_found"
                else:
                    self.counts["library_asks"] += 1
                    if self.library.down is not None:
                        self.counts["library_failures"] += 1
                        expected = "failed"
                    elif kernel_id in self.library.kernels:
                        expected = "kernel"
                        self.counts["fetched"] += 1
                        self.keeps(kernel_id)
                    else:
                        self.absent[kernel_id] = REMEMBERED
                        expected = "not_found"
                if expected != "kernel":
                    self.counts[expected] += 1
            if expected == "kernel":
                self.asked(kernel_id)
                found = self.cache.load_kernel_sync(kernel_id)
                assert found is not None
                assert found.data == next(k for k in kernels if k.kernel_id == kernel_id).data
            elif expected == "failed":
                with pytest.raises(LibraryError, match="library could not be asked"):
                    self.cache.load_kernel_sync(kernel_id)
            else:
                assert self.cache.load_kernel_sync(kernel_id) is None

        @rule(number=st.integers(0, KERNELS - 1))
        def put(self, number: int) -> None:
            self.keeps(ids[number])
            assert self.cache.put(kernels[number]) == ids[number]

        @rule(kernel_id=some, score=st.floats(0.0, 1.0))
        def performs(self, kernel_id: str, score: float) -> None:
            assert self.cache.record_performance(kernel_id, score) == (kernel_id in self.seen)
            if kernel_id in self.seen:
                self.seen[kernel_id].performance = score

        @rule(kernel_id=some)
        def fails(self, kernel_id: str) -> None:
            assert self.cache.record_failure(kernel_id) == (kernel_id in self.seen)
            if kernel_id in self.seen:
                self.seen[kernel_id].failures += 1

        @rule(number=st.integers(0, KERNELS - 1))
        def library_gains(self, number: int) -> None:
            self.library.kernels[ids[number]] = kernels[number]

        @rule(kernel_id=some)
        def library_loses(self, kernel_id: str) -> None:
            self.library.kernels.pop(kernel_id, None)

        @rule(down=st.booleans())
        def library_is_down(self, down: bool) -> None:
            self.library.down = DOWN if down else None

        @rule()
        def clear(self) -> None:
            # In the order in which they came to be there, which is the cache's own affair.
            for kernel_id in self.cache.get_cache_stats()["cache_keys"]:
                self.leaves(kernel_id)
            self.memory.clear()
            self.cache.clear()

        # ---- and what must be so after each ----

        @invariant()
        def is_the_model(self) -> None:
            stats = self.cache.get_enhanced_stats()
            assert set(stats["cache_keys"]) == set(self.memory)
            assert stats["entries"] == len(self.cache) == len(self.memory) <= MAX_ENTRIES
            assert stats["total_bytes"] == self.used() <= max_bytes
            assert {name: stats[name] for name in self.counts} == self.counts
            assert stats["metadata_cache_size"] == len(self.seen)
            ends = ("disk_hits", "fetched", "not_found", "failed", "joined", "interrupted")
            assert stats["misses"] == sum(stats[end] for end in ends)
            assert stats["library_asks"] == len(self.library.asks)
            for kernel_id in ids:
                known, seen = self.cache.metadata(kernel_id), self.seen.get(kernel_id)
                assert (known is None) == (seen is None)
                if known is not None and seen is not None:
                    assert (known.failures, known.accesses) == (seen.failures, seen.accesses)
                    assert known.last_access == seen.last_access

    return Machine


def test_the_cache_is_its_model(artifact):
    kernels = [variant(artifact, n, padding=3000 * (n % 3)) for n in range(KERNELS - 1)]
    kernels.append(variant(artifact, KERNELS, padding=200_000))
    run_state_machine_as_test(
        machine(kernels), settings=settings(max_examples=100, stateful_step_count=60)
    )

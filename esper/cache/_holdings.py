"""What this process has at hand, and what it knows: one lock over all of it."""

import threading
from typing import Literal

from esper.artifacts import Artifact
from esper.cache._device import DeviceTiers
from esper.cache._forks import hold_at_fork
from esper.cache._history import FollowTable
from esper.cache._index import Index, Known
from esper.cache._limits import Limits, in_bytes
from esper.cache._metadata import artifact_bytes, describe_artifact
from esper.cache._prefetch import Prefetcher
from esper.cache._source import check_id
from esper.cache._statistics import Counts
from esper.cache._tier import Entry, Tier
from esper.contracts import KernelMetadata

Ending = Literal["disk_hits", "fetched", "not_found", "failed", "joined", "interrupted"]
"""How a miss ends; each is a count."""


class Holdings:
    """Artifacts in memory, what backends made of them, and what is known of kernels."""

    def __init__(self, limits: Limits) -> None:
        self.lock = threading.Lock()
        hold_at_fork(self.lock)
        self.counts = Counts()
        self.index = Index(limits.max_metadata)
        self.memory: Tier[str, Artifact] = Tier(
            in_bytes(limits.max_cache_size_mb), limits.max_entries
        )
        self.devices = DeviceTiers(
            in_bytes(limits.max_device_mb), self.lock, self._grade, self._asked
        )
        self.prefetcher: Prefetcher
        """Set by whoever fetches."""
        self._ahead = limits.prefetch
        self._history = FollowTable()

    def hit(self, kernel_id: str) -> Artifact | None:
        """What memory answers to an ask; None, and a miss begins, where it has no answer.

        Raises:
            InputError: for what is no id.
        """
        check_id(kernel_id)
        with self.lock:
            entry = self.memory.get(kernel_id)
            if entry is None:
                self.counts.misses += 1
                return None
            self.counts.hits += 1
            self._seen(kernel_id, entry)
        return entry.value

    def ended(self, kernel_id: str, ending: Ending, found: bool = False) -> None:
        """A miss has ended, with a kernel or without."""
        with self.lock:
            setattr(self.counts, ending, getattr(self.counts, ending) + 1)
            if found:
                self._seen(kernel_id, self.memory.peek(kernel_id))

    def _seen(self, kernel_id: str, entry: Entry[Artifact] | None) -> None:
        self._asked(kernel_id)
        if entry is not None and entry.fresh:
            entry.fresh = False
            self.counts.prefetches_used += 1
        if self._ahead:
            self._history.saw(kernel_id)
            for expected in self._history.expected(kernel_id, self._ahead):
                if expected not in self.memory:
                    self.prefetcher.submit(expected)

    def _asked(self, kernel_id: str) -> None:
        known = self.index.asked(kernel_id)
        # Of a kernel that never failed, one more ask does not change what it is worth.
        if known is not None and known.failures:
            self._regrade(kernel_id, known)

    def submit(self, kernel_id: str) -> bool:
        """Have a kernel fetched that is not there; whether it will be.

        Raises:
            InputError: for what is no id.
        """
        check_id(kernel_id)
        return kernel_id not in self.memory and self.prefetcher.submit(kernel_id)

    def peek(self, kernel_id: str) -> Artifact | None:
        """What is in memory, which is no ask for it."""
        with self.lock:
            entry = self.memory.peek(kernel_id)
        return None if entry is None else entry.value

    def keep(self, artifact: Artifact, *, fresh: bool = False) -> None:
        """Keep an artifact in memory where it has room, and in any case know what it is.

        Args:
            fresh: that nobody has asked for it yet.
        """
        kernel_id, size = artifact.kernel_id, artifact_bytes(artifact)
        metadata = describe_artifact(artifact)
        with self.lock:
            counts, index = self.counts, self.index
            if self.memory.get(kernel_id) is not None:
                return
            if not self.memory.admits(size):
                counts.too_large += size > self.memory.max_bytes
                index.note(metadata)
                return
            grade = index.hold(metadata).grade()
            for gone in self.memory.put(kernel_id, artifact, size, grade, fresh=fresh):
                if gone.reason == "bytes":
                    counts.evictions_bytes += 1
                else:
                    counts.evictions_entries += 1
                counts.prefetches_wasted += gone.fresh
                index.release(gone.key)

    def known(self, kernel_id: str) -> KernelMetadata | None:
        """What is known of a kernel, with what was seen of it; None where nothing is.

        Raises:
            InputError: for what is no id.
        """
        check_id(kernel_id)
        with self.lock:
            known = self.index.get(kernel_id)
            return None if known is None else known.seen()

    def report(self, kernel_id: str, *, performance: float | None, failures: int) -> bool:
        """What a kernel was seen to do; False where nothing is known of it.

        Raises:
            InputError: for what is no id.
        """
        check_id(kernel_id)
        with self.lock:
            known = self.index.get(kernel_id)
            if known is None:
                return False
            known.failures += failures
            if performance is not None:
                known.performance = performance
            self._regrade(kernel_id, known)
        return True

    def _regrade(self, kernel_id: str, known: Known) -> None:
        grade = known.grade()
        self.memory.regrade(kernel_id, grade)
        self.devices.regrade(kernel_id, grade)

    def _grade(self, kernel_id: str) -> int:
        known = self.index.get(kernel_id)
        return Known.UNKNOWN_GRADE if known is None else known.grade()

    def count(self, **more: int) -> None:
        """Add to counts, by name."""
        with self.lock:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)

    def clear(self) -> None:
        """Let go of all artifacts, and of what was made of them; what is known stays."""
        self.devices.drop()
        with self.lock:
            for kernel_id, entry in self.memory.clear():
                self.counts.prefetches_wasted += entry.fresh
                self.index.release(kernel_id)

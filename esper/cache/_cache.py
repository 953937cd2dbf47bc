"""Kernels at hand: in memory, on devices, on the disk, and behind them the library.

An ask that memory answers takes one lock and no thread; all else is done once for all who ask
for the same kernel meanwhile. What is kept follows from what was asked for and reported.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from esper.artifacts import Artifact
from esper.cache._disk import DiskTier
from esper.cache._events import CacheEvent, Events
from esper.cache._fetching import Fetching, Outcome
from esper.cache._holdings import Holdings
from esper.cache._index import Backend, Requirements
from esper.cache._limits import Limits, in_bytes
from esper.cache._metadata import describe_artifact, describe_record
from esper.cache._prefetch import Prefetcher
from esper.cache._prometheus import register
from esper.cache._source import Guard, KernelSource, LeftBehind, unguarded
from esper.cache._statistics import basic, enhanced
from esper.contracts import KernelMetadata
from esper.errors import InputError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from esper.urza import KernelRecord

T = TypeVar("T")


class KernelCache:
    """Keeps kernels at hand, by id. Safe among threads.

    Args:
        library: where kernels come from that the cache does not have; None for a cache of what
            is put into it.
        max_cache_size_mb: most MB (2²⁰ bytes) of artifacts in memory.
        max_entries: most artifacts in memory.
        max_device_mb: most MB on each device of what backends made of them.
        disk: a folder for artifacts that outlast the process; other processes may share it.
        max_disk_mb: most MB in the folder.
        max_metadata: of how many kernels that are not in memory it is known what they are.
        guard: calls the library, or raises in its stead, as a circuit breaker does.
        remember_missing: for how many further asks a kernel that was not found is taken to be
            absent without asking the library again.
        prefetch: how many kernels are fetched in the background after each ask, those that
            most often came next; 0 for none.
        max_fetches: how many kernels are fetched at once for asynchronous askers.
        on_event: told of what went wrong while loading went on; see `CacheEvent`.
        registry: where Prometheus finds the statistics, labelled with `name`.

    Raises:
        InputError: for a limit that is none, a folder that cannot be used, an id that is no text,
            a name that another cache of the registry has.

    Copies are empty, with the same limits and folder. They share library, guard and listener;
    an unpickled cache has none, and must be given its library anew.
    """

    def __init__(
        self,
        library: KernelSource | None = None,
        *,
        max_cache_size_mb: float = 512,
        max_entries: int = 128,
        max_device_mb: float = 512,
        disk: Path | str | None = None,
        max_disk_mb: float = 4096,
        max_metadata: int = 10_000,
        guard: Guard | None = None,
        remember_missing: int = 0,
        prefetch: int = 0,
        max_fetches: int = 32,
        on_event: Callable[[CacheEvent], None] | None = None,
        registry: "CollectorRegistry | None" = None,
        name: str = "kernels",
    ) -> None:
        self.limits = Limits(
            max_cache_size_mb=max_cache_size_mb,
            max_entries=max_entries,
            max_device_mb=max_device_mb,
            max_disk_mb=max_disk_mb,
            max_metadata=max_metadata,
            remember_missing=remember_missing,
            prefetch=prefetch,
            max_fetches=max_fetches,
        )
        self._holdings = Holdings(self.limits)
        self._fetching = Fetching(
            self._holdings,
            None if disk is None else DiskTier(disk, in_bytes(max_disk_mb)),
            library,
            guard or unguarded,
            Events(on_event),
            remember_missing,
            max_fetches,
        )
        self._holdings.prefetcher = Prefetcher(self._fetching.fetch_ahead)
        if registry is not None:
            register(self, registry, name)

    @property
    def library(self) -> KernelSource | None:
        """Where kernels come from that the cache does not have; a new one is asked anew."""
        return self._fetching.library

    @library.setter
    def library(self, library: KernelSource | None) -> None:
        self._fetching.library = library

    @property
    def disk(self) -> DiskTier | None:
        """The disk tier."""
        return self._fetching.disk

    # ---- loading ----

    def load_kernel_sync(self, artifact_id: str) -> Artifact | None:
        """The kernel of an id; None where neither the cache nor the library has it.

        Raises:
            LibraryError: where it is not at hand and the library could not be asked.
            ArtifactError: where the library's, or the only copy that there was, is damaged.
        """
        found = self._holdings.hit(artifact_id)
        if found is not None:
            return found
        try:
            outcome, leads = self._fetching.run(artifact_id)
        except BaseException:
            self._holdings.ended(artifact_id, "interrupted")
            raise
        return self._answer(artifact_id, outcome, leads)

    async def load_kernel(self, artifact_id: str) -> Artifact | None:
        """As `load_kernel_sync`: a hit at once, a miss without holding up the event loop."""
        found = self._holdings.hit(artifact_id)
        if found is not None:
            return found
        try:
            outcome, leads = await self._fetching.run_async(artifact_id)
        except BaseException:
            self._holdings.ended(artifact_id, "interrupted")
            raise
        return self._answer(artifact_id, outcome, leads)

    def _answer(self, kernel_id: str, outcome: Outcome, leads: bool) -> Artifact | None:
        ending = outcome.ending if leads else "joined"
        self._holdings.ended(kernel_id, ending, found=outcome.artifact is not None)
        if outcome.error is not None:
            raise self._fetching.explained(kernel_id, outcome.error) from outcome.error
        return outcome.artifact

    async def get_kernel_bytes(self, artifact_id: str) -> bytes | None:
        """The file of a kernel, as `load_kernel` finds it."""
        artifact = await self.load_kernel(artifact_id)
        return None if artifact is None else artifact.data

    def put(self, artifact: Artifact) -> str:
        """Keep an artifact in memory and on the disk, within the limits; its id.

        Raises:
            InputError: for what is no artifact.
        """
        if not isinstance(artifact, Artifact):
            raise InputError(
                f"a cache holds artifacts, got a {type(artifact).__name__}: read one by"
                " esper.artifacts.read_artifact"
            )
        self._fetching.keep(artifact)
        return artifact.kernel_id

    def __contains__(self, artifact_id: object) -> bool:
        """Whether a kernel is in memory, which is no ask for it."""
        return artifact_id in self._holdings.memory

    def __len__(self) -> int:
        return len(self._holdings.memory)

    # ---- devices ----

    def load_on_device(
        self,
        artifact_id: str,
        *,
        backend: str,
        device: object,
        load: Callable[[Artifact], T],
        size: Callable[[T], int],
    ) -> T | None:
        """What a backend made of a kernel on a device, made now where it is not there.

        Args:
            backend: who makes it, such as `torch`.
            device: where it is; known by its name, `str(device)`.
            load: makes it of the artifact; called once, however many ask meanwhile.
            size: its bytes on the device.

        Returns:
            What `load` returned; None where there is no such kernel.

        Raises:
            InputError: for a size that is none.
            Exception: whatever `load`, or `load_kernel_sync`, raises.
        """
        devices, place = self._holdings.devices, str(device)
        found = devices.get(artifact_id, backend, place)
        if found is not None:
            return found[0]
        artifact = self.load_kernel_sync(artifact_id)
        if artifact is None:
            return None
        return devices.load(artifact_id, backend, place, partial(load, artifact), size)

    def drop_device(self, device: object) -> int:
        """Let go of all that is on a device, when its memory is wanted; the bytes given up."""
        return self._holdings.devices.drop(str(device))

    # ---- what is known of kernels ----

    def record_performance(self, artifact_id: str, score: float) -> bool:
        """How well a kernel did, from 0 to 1; False where the cache knows nothing of it.

        Raises:
            InputError: for a score that is none.
        """
        if not (isinstance(score, int | float) and 0.0 <= score <= 1.0):
            raise InputError(
                f"the performance of kernel {artifact_id!s:.12} must be from 0 to 1, got {score!r}"
            )
        return self._holdings.report(artifact_id, performance=float(score), failures=0)

    def record_failure(self, artifact_id: str) -> bool:
        """That a kernel failed when it ran; False where the cache knows nothing of it."""
        return self._holdings.report(artifact_id, performance=None, failures=1)

    def metadata(self, artifact_id: str) -> KernelMetadata | None:
        """What is known of a kernel, be it in memory or not; None where nothing is."""
        return self._holdings.known(artifact_id)

    def load_metadata(self, records: "Iterable[KernelRecord]") -> int:
        """Know kernels by the library's records, such as those of `Library.find`.

        Those known already are left as they are, and none is forgotten for them.

        Returns:
            How many were new and had room.

        Raises:
            InputError: for one that cannot be read; none is taken then.
        """
        several = [describe_record(record) for record in records]
        with self._holdings.lock:
            return self._holdings.index.note_all(several)

    def find_compatible_kernels(
        self,
        target_shape: Sequence[int],
        device: object,
        max_memory_mb: float | None = None,
        *,
        dtype: str | None = None,
        output_shape: Sequence[int] | None = None,
        max_parameters: int | None = None,
        backend: Backend | None = None,
    ) -> list[tuple[str, KernelMetadata]]:
        """The known kernels that fit, best first: by measured score, then the last asked for.

        Args:
            target_shape: of an input, its batch axis first.
            device: its name, or a device of torch or jax.
            max_memory_mb: most MB for parameters and a batch of that shape, in and out.
            dtype: such as `float32`.
            output_shape: of an output, its batch axis first.
            max_parameters: most trainable scalars.
            backend: who is to run it; by default whose the device is, or whoever can.

        Raises:
            InputError: for what is no shape, or no device.
        """
        wanted = Requirements.of(
            target_shape, device, backend, dtype, output_shape, max_memory_mb, max_parameters
        )
        with self._holdings.lock:
            return self._holdings.index.fitting(wanted)

    async def load_kernel_with_validation(
        self,
        artifact_id: str,
        target_shape: Sequence[int],
        device: object,
        batch_size: int = 32,
        *,
        max_memory_mb: float | None = None,
        dtype: str | None = None,
        output_shape: Sequence[int] | None = None,
        max_parameters: int | None = None,
        backend: Backend | None = None,
    ) -> tuple[Artifact, KernelMetadata] | None:
        """A kernel that fits, and what is known of it; None where there is none or it does not.

        One that is known not to fit is not fetched. Why it does not is an event.

        Args:
            batch_size: examples for which memory is counted, instead of the shape's own.
            max_memory_mb: by default the limit of the cache in memory.

        Further arguments, and errors, are those of `find_compatible_kernels` and `load_kernel`.
        """
        most = self.limits.max_cache_size_mb if max_memory_mb is None else max_memory_mb
        wanted = Requirements.of(
            target_shape, device, backend, dtype, output_shape, most, max_parameters, batch_size
        )
        known = self.metadata(artifact_id)
        if known is not None and not self._fits(known, wanted):
            return None
        artifact = await self.load_kernel(artifact_id)
        if artifact is None:
            return None
        # Of one that was not in memory, more is known now.
        loaded = self.metadata(artifact_id) or describe_artifact(artifact)
        if (known is None or known.platforms is None) and not self._fits(loaded, wanted):
            return None
        self._holdings.count(compatibility_checks=1)
        return artifact, loaded

    def _fits(self, known: KernelMetadata, wanted: Requirements) -> bool:
        refusal = wanted.refusal(known)
        if refusal is None:
            return True
        self._holdings.count(compatibility_checks=1, compatibility_failures=1)
        self._fetching.events.report("incompatible", known.kernel_id, refusal)
        return False

    # ---- in the background ----

    def prefetch(self, artifact_ids: Iterable[str]) -> int:
        """Fetch kernels in the background; how many were not there, and had room to wait."""
        submit = self._holdings.submit
        return sum(submit(artifact_id) for artifact_id in artifact_ids)

    def cancel_prefetches(self) -> int:
        """Forget what waits to be fetched in the background; how many."""
        return self._holdings.prefetcher.cancel()

    def wait_for_prefetches(self, timeout: float | None = None) -> bool:
        """Wait until none is left, at most so many seconds; whether none is."""
        return self._holdings.prefetcher.wait(timeout)

    def clear(self) -> None:
        """Let go of all that is in memory and on devices; the disk tier is left as it is."""
        self._holdings.clear()

    def close(self) -> None:
        """End the work in the background; what is being fetched is waited for."""
        self._holdings.prefetcher.stop()
        self._fetching.close()

    # ---- statistics and copies ----

    def events(self) -> list[CacheEvent]:
        """What went wrong lately while loading went on: the last 256, oldest first."""
        return self._fetching.events.last()

    def get_cache_stats(self) -> dict[str, Any]:
        """Entries, sizes in MB, hits, misses, evictions, share of hits, and the ids in memory."""
        return basic(self._holdings, self.limits)

    def get_enhanced_stats(self) -> dict[str, Any]:
        """All that is counted, of every tier; see docs/cache.md."""
        return enhanced(self._holdings, self._fetching, self.limits)

    def _options(self) -> dict[str, Any]:
        folder = None if self.disk is None else self.disk.folder
        return {**dataclasses.asdict(self.limits), "disk": folder}

    def __copy__(self) -> "KernelCache":
        fetching = self._fetching
        return KernelCache(
            fetching.library,
            guard=fetching.guard,
            on_event=fetching.events.listener,
            **self._options(),
        )

    def __deepcopy__(self, _: Any) -> "KernelCache":
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any], bool]]:
        return _unpickled, (self._options(), self.library is not None)


def _unpickled(options: dict[str, Any], had_library: bool) -> KernelCache:
    return KernelCache(LeftBehind() if had_library else None, **options)

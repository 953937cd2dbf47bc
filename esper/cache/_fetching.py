"""From where a kernel comes that memory does not have: the disk, then the library."""

import asyncio
import copy
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from esper.artifacts import Artifact
from esper.cache._disk import DiskTier
from esper.cache._events import CacheEvent, Events
from esper.cache._flights import Abandoned, Flights
from esper.cache._forks import renew_at_fork
from esper.cache._holdings import Ending, Holdings
from esper.cache._source import Absent, Guard, KernelSource, ask
from esper.errors import ArtifactError, LibraryError


class Outcome(NamedTuple):
    """What came of a fetch; it raises nothing, so that each asker gets an error of its own."""

    ending: Ending
    """Of the miss of whoever did it; `joined` where another had done it before."""
    artifact: Artifact | None = None
    error: Exception | None = None


class Fetching:
    """Fetches each kernel once, for all who ask for it meanwhile."""

    def __init__(
        self,
        holdings: Holdings,
        disk: DiskTier | None,
        library: KernelSource | None,
        guard: Guard,
        events: Events,
        remember_missing: int,
        max_fetches: int,
    ) -> None:
        self.flights: Flights[str, Outcome] = Flights()
        self.disk = disk
        self._library = library
        self.guard = guard
        self.events = events
        self._holdings = holdings
        self._absent = Absent(remember_missing)
        self._max_fetches = max_fetches
        self._pool: ThreadPoolExecutor | None = None
        self._ends: weakref.finalize[..., Fetching] | None = None
        renew_at_fork(self)

    def forked(self) -> None:
        """The threads of the pool have stayed in the parent."""
        self._pool = None
        if self._ends is not None:
            self._ends.detach()

    @property
    def library(self) -> KernelSource | None:
        """Whom to ask last."""
        return self._library

    @library.setter
    def library(self, library: KernelSource | None) -> None:
        with self._holdings.lock:
            self._library = library
            self._absent.clear()

    def run(self, kernel_id: str, *, fresh: bool = False) -> tuple[Outcome, bool]:
        """Fetch here, or wait for who is at it; and whether it was done here."""
        events: list[CacheEvent] = []
        fetch = partial(self.fetch, kernel_id, events, fresh=fresh)
        # A listener may ask for the kernel that it is told of: it is told when that is here.
        return self.flights.run(kernel_id, fetch, partial(self.events.tell, events))

    async def run_async(self, kernel_id: str) -> tuple[Outcome, bool]:
        """As `run`, in a thread that serves no asker: one who is cancelled leaves it going."""
        while True:
            flight, leads = self.flights.join(kernel_id)
            if leads:
                events: list[CacheEvent] = []
                fetch = partial(self.fetch, kernel_id, events)
                tell = partial(self.events.tell, events)
                self._in_background(partial(self.flights.fly, kernel_id, flight, fetch, tell))
            try:
                return await asyncio.wrap_future(flight), leads
            except Abandoned:
                continue

    def _in_background(self, work: Callable[[], None]) -> None:
        with self._holdings.lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._max_fetches, "esper-fetch")
                self._ends = weakref.finalize(self, self._pool.shutdown, wait=False)
                self._ends.atexit = False
            pool = self._pool
        try:
            pool.submit(work)
        except RuntimeError:
            # It was closed meanwhile, or the interpreter exits and starts no threads any more.
            work()

    def fetch_ahead(self, kernel_id: str) -> None:
        """Fetch what nobody has asked for yet; raises nothing."""
        outcome, leads = self.run(kernel_id, fresh=True)
        brought = leads and outcome.ending in ("disk_hits", "fetched")
        failed = outcome.artifact is None
        self._holdings.count(prefetches=1, prefetches_fetched=brought, prefetches_failed=failed)
        if failed:
            self.events.report("prefetch", kernel_id, outcome.error or "it is not in the library")

    def close(self) -> None:
        """Wait for what is being fetched."""
        with self._holdings.lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def fetch(self, kernel_id: str, events: list[CacheEvent], *, fresh: bool = False) -> Outcome:
        """Fetch a kernel into memory, from the nearest place that has it; raises nothing.

        Args:
            events: where it is put what is to be told of it.
            fresh: that nobody has asked for it yet.
        """
        # Another may have brought it since it was missed.
        artifact = self._holdings.peek(kernel_id)
        if artifact is not None:
            return Outcome("joined", artifact)
        try:
            artifact, damage = self._from_disk(kernel_id, events)
            if artifact is not None:
                self._holdings.keep(artifact, fresh=fresh)
                return Outcome("disk_hits", artifact)
            artifact = self._from_library(kernel_id, events)
            if artifact is None:
                return Outcome("not_found") if damage is None else Outcome("failed", None, damage)
            self._keep(artifact, events, fresh=fresh)
        except Exception as error:
            return Outcome("failed", None, error)
        return Outcome("fetched", artifact)

    def keep(self, artifact: Artifact) -> None:
        """Keep an artifact on the disk and in memory, within their limits."""
        events: list[CacheEvent] = []
        self._keep(artifact, events)
        self.events.tell(events)

    def _keep(self, artifact: Artifact, events: list[CacheEvent], *, fresh: bool = False) -> None:
        if self.disk is not None:
            try:
                done = self.disk.put(artifact)
            except OSError as error:
                self._holdings.count(disk_failures=1)
                events.append(self.events.keep("disk", artifact.kernel_id, error))
            else:
                self._holdings.count(disk_evictions=done.evicted, too_large=not done.kept)
        self._holdings.keep(artifact, fresh=fresh)
        with self._holdings.lock:
            self._absent.forget(artifact.kernel_id)

    def _from_disk(
        self, kernel_id: str, events: list[CacheEvent]
    ) -> tuple[Artifact | None, ArtifactError | None]:
        """The artifact, or how its file was damaged."""
        if self.disk is None:
            return None, None
        try:
            return self.disk.get(kernel_id), None
        except ArtifactError as error:
            self._holdings.count(disk_damaged=1)
            events.append(self.events.keep("damaged", kernel_id, error))
            return None, ArtifactError(
                f"{error}. The library has no other: compile kernel {kernel_id[:12]} again."
            )
        except OSError as error:
            self._holdings.count(disk_failures=1)
            events.append(self.events.keep("disk", kernel_id, error))
            return None, None

    def _from_library(self, kernel_id: str, events: list[CacheEvent]) -> Artifact | None:
        with self._holdings.lock:
            library = self._library
            if library is None or self._absent.recalls(kernel_id):
                return None
            self._holdings.counts.library_asks += 1
        try:
            artifact = ask(library, self.guard, kernel_id)
        except (ArtifactError, LibraryError) as error:
            self._holdings.count(library_failures=1)
            events.append(self.events.keep("library", kernel_id, error))
            raise
        if artifact is None:
            with self._holdings.lock:
                # What another has not says nothing of the one that took its place meanwhile.
                if library is self._library:
                    self._absent.note(kernel_id)
        return artifact

    def explained(self, kernel_id: str, error: Exception) -> Exception:
        """An error of one asker's own, saying what is at hand where the library is down."""
        if isinstance(error, ArtifactError):
            return ArtifactError(str(error))
        if not isinstance(error, LibraryError):
            return _copied(error)
        with self._holdings.lock:
            at_hand = f"{len(self._holdings.memory)} in memory"
        if self.disk is not None:
            at_hand += f", and what is in {self.disk.folder}"
        return LibraryError(
            f"kernel {kernel_id[:12]} is not in the cache, and the library could not be asked for"
            f" it: {error}. At hand: {at_hand}. Use one of those, or ask again when the library"
            " answers."
        )


def _copied(error: Exception) -> Exception:
    try:
        found = copy.copy(error)
    except Exception:  # whatever its constructor raises for arguments that are not its own
        found = None
    if found is not None and type(found) is type(error):
        return found
    return RuntimeError(f"{type(error).__name__}: {error}")

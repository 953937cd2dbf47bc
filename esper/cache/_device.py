"""What backends made of artifacts, on their devices."""

import dataclasses
from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

from esper.cache._flights import Flights
from esper.cache._source import check_id
from esper.cache._tier import Evicted, Tier
from esper.errors import InputError

_Key = tuple[str, str]
"""Kernel id and backend."""


class Held(NamedTuple):
    """What one device holds."""

    entries: int
    bytes: int


@dataclasses.dataclass
class DeviceCounts:
    """What was asked of all devices, since the cache was made."""

    hits: int = 0
    misses: int = 0
    too_large: int = 0
    """Values larger than all of a device's limit, and not kept."""
    evictions: int = 0
    dropped: int = 0
    """Values that went because their device's memory was wanted, or all was cleared."""


class DeviceTiers:
    """One tier a device, each with the same limit. Locks itself by the lock that it is given.

    Args:
        max_bytes: most bytes on each device.
        grade: the grade of a kernel; called under the lock.
        asked: told of a kernel that was asked for and is there; called under the lock.
    """

    def __init__(
        self,
        max_bytes: int,
        lock: Lock,
        grade: Callable[[str], int],
        asked: Callable[[str], object],
    ) -> None:
        self.max_bytes = max_bytes
        self.counts = DeviceCounts()
        self._lock = lock
        self._grade = grade
        self._asked = asked
        self._tiers: dict[str, Tier[_Key, Any]] = {}
        self._backends: set[str] = set()
        self._flights: Flights[tuple[str, str, str], Any] = Flights()

    def get(self, kernel_id: str, backend: str, device: str) -> tuple[Any] | None:
        """What is there, as a tuple of one; None where nothing is.

        Raises:
            InputError: for what is no id.
        """
        check_id(kernel_id)
        with self._lock:
            tier = self._tiers.get(device)
            entry = None if tier is None else tier.get((kernel_id, backend))
            if entry is None:
                self.counts.misses += 1
                return None
            self.counts.hits += 1
            self._asked(kernel_id)
            return (entry.value,)

    def load(
        self,
        kernel_id: str,
        backend: str,
        device: str,
        make: Callable[[], Any],
        size: Callable[[Any], int],
    ) -> Any:
        """Make a value, or wait for who is at it, and keep it.

        Raises:
            InputError: for a size that is none.
            Exception: whatever `make` raises, to all who wait for it.
        """

        def fly() -> Any:
            with self._lock:
                tier = self._tiers.get(device)
                entry = None if tier is None else tier.peek((kernel_id, backend))
            if entry is not None:
                return entry.value
            value = make()
            self._keep(kernel_id, backend, device, value, size(value))
            return value

        value, _ = self._flights.run((kernel_id, backend, device), fly)
        return value

    def _keep(self, kernel_id: str, backend: str, device: str, value: Any, size: Any) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise InputError(
                f"the size of kernel {kernel_id[:12]} on {device} must be a whole number of bytes,"
                f" at least 0, got {size!r}"
            )
        with self._lock:
            tier = self._tiers.get(device)
            if tier is None:
                tier = self._tiers[device] = Tier(self.max_bytes)
            if not tier.admits(size):
                self.counts.too_large += 1
                return
            self._backends.add(backend)
            gone: list[Evicted[_Key]] = tier.put(
                (kernel_id, backend), value, size, self._grade(kernel_id)
            )
            self.counts.evictions += len(gone)

    def regrade(self, kernel_id: str, grade: int) -> None:
        """Give a kernel another grade on all devices; to be called under the lock."""
        for tier in self._tiers.values():
            for backend in self._backends:
                tier.regrade((kernel_id, backend), grade)

    def drop(self, device: str | None = None) -> int:
        """Let go of what is on a device, or on all; the bytes given up."""
        with self._lock:
            names = [*self._tiers] if device is None else [device]
            tiers = [self._tiers.pop(name) for name in names if name in self._tiers]
            self.counts.dropped += sum(map(len, tiers))
        return sum(tier.bytes for tier in tiers)

    def held(self) -> dict[str, Held]:
        """What each device holds; to be called under the lock."""
        return {name: Held(len(t), t.bytes) for name, t in self._tiers.items()}

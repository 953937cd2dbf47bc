"""What a cache counts."""

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.cache._fetching import Fetching
    from esper.cache._holdings import Holdings
    from esper.cache._limits import Limits


@dataclasses.dataclass
class Counts:
    """Since the cache was made. Each ask is a hit, or a miss that ends in one of six ways."""

    hits: int = 0
    """Asks that memory answered."""
    misses: int = 0
    """Asks that it did not."""
    disk_hits: int = 0
    """Misses that the disk tier answered."""
    fetched: int = 0
    """Misses that the library answered with a kernel."""
    not_found: int = 0
    """Misses of kernels that are nowhere: an answer too, and no failure."""
    failed: int = 0
    """Misses that ended in an error."""
    joined: int = 0
    """Misses that got what another's fetch brought, be it a kernel or not."""
    interrupted: int = 0
    """Misses whose asker was cancelled or interrupted."""
    library_asks: int = 0
    """Calls of the library, for misses and prefetches."""
    library_failures: int = 0
    """Calls of it that failed; one that finds nothing does not."""
    disk_damaged: int = 0
    """Files found damaged, and removed."""
    disk_failures: int = 0
    """Reads and writes of the disk tier that failed."""
    disk_evictions: int = 0
    evictions_bytes: int = 0
    """Evictions from memory for want of bytes."""
    evictions_entries: int = 0
    """Evictions from memory for want of entries."""
    too_large: int = 0
    """Kernels that were larger than all of a tier's limit, and not kept in it."""
    prefetches: int = 0
    """Prefetches begun."""
    prefetches_fetched: int = 0
    """Prefetches that brought a kernel into memory."""
    prefetches_failed: int = 0
    """Prefetches that found none, or an error."""
    prefetches_used: int = 0
    """Prefetched kernels that were asked for."""
    prefetches_wasted: int = 0
    """Prefetched kernels that went before they were."""
    compatibility_checks: int = 0
    compatibility_failures: int = 0


def basic(holdings: "Holdings", limits: "Limits") -> dict[str, Any]:
    """The statistics that a cache of one tier would have, of the one in memory."""
    with holdings.lock:
        return _of_memory(holdings, limits)


def _of_memory(holdings: "Holdings", limits: "Limits") -> dict[str, Any]:
    """The same; to be called under the lock."""
    counts, memory = holdings.counts, holdings.memory
    asks = counts.hits + counts.misses
    return {
        "entries": len(memory),
        "total_size_mb": memory.bytes / (1 << 20),
        "max_size_mb": limits.max_cache_size_mb,
        "max_entries": limits.max_entries,
        "hits": counts.hits,
        "misses": counts.misses,
        "evictions": counts.evictions_bytes + counts.evictions_entries,
        "hit_rate": counts.hits / asks if asks else 0.0,
        "cache_keys": list(memory),
    }


def enhanced(holdings: "Holdings", fetching: "Fetching", limits: "Limits") -> dict[str, Any]:
    """Everything that is counted; what one lock guards is of one moment."""
    with holdings.lock:
        stats = _of_memory(holdings, limits)
        counts = dataclasses.asdict(holdings.counts)
        devices = holdings.devices.held()
        of_devices = dataclasses.asdict(holdings.devices.counts)
        total_bytes = holdings.memory.bytes
        known = [holdings.index.get(kernel_id) for kernel_id in holdings.memory]
        metadata = len(holdings.index)
    told = [each.metadata for each in known if each is not None]
    checks = counts["compatibility_checks"]
    disk_bytes = disk_entries = None
    if fetching.disk is not None:
        with suppress(OSError):
            disk_bytes, disk_entries = fetching.disk.bytes, len(fetching.disk)
    return {
        **stats,
        **counts,
        "total_bytes": total_bytes,
        "max_bytes": holdings.memory.max_bytes,
        **{f"device_{name}": count for name, count in of_devices.items()},
        "device_entries": sum(held.entries for held in devices.values()),
        "device_bytes": sum(held.bytes for held in devices.values()),
        "devices": {name: held._asdict() for name, held in devices.items()},
        "disk_bytes": disk_bytes,
        "disk_entries": disk_entries,
        "metadata_cache_size": metadata,
        "compatibility_rate": (checks - counts["compatibility_failures"]) / checks
        if checks
        else 0.0,
        "total_estimated_memory_mb": sum(each.memory_footprint_mb for each in told),
        "average_kernel_parameters": sum(each.parameter_count for each in told) / len(told)
        if told
        else 0.0,
        "prefetches_waiting": holdings.prefetcher.waiting,
        "prefetches_dropped": holdings.prefetcher.dropped,
        "listener_failures": fetching.events.listener_failures,
    }

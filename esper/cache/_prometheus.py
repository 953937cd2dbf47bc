"""The statistics of caches, as Prometheus collects them."""

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from esper.cache._device import DeviceCounts
from esper.cache._statistics import Counts
from esper.errors import InputError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from esper.cache._cache import KernelCache

_COUNTERS = frozenset(
    {
        *(field.name for field in dataclasses.fields(Counts)),
        *(f"device_{field.name}" for field in dataclasses.fields(DeviceCounts)),
        "evictions",
        "prefetches_dropped",
        "listener_failures",
    }
)
"""What only grows; every other number is a gauge."""


class Collector:
    """The caches of one registry: a family of metrics for each number, a sample for each cache."""

    def __init__(self) -> None:
        self._caches: weakref.WeakValueDictionary[str, KernelCache] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def add(self, name: str, cache: "KernelCache") -> None:
        """Collect a cache's numbers too, for as long as it lives.

        Raises:
            InputError: where another has the name.
        """
        with self._lock:
            if name in self._caches:
                raise InputError(
                    f"the registry has a cache named {name!r} already: give this one another"
                    " name, by name=, or let go of that one first"
                )
            self._caches[name] = cache

    def collect(self) -> Iterator[Any]:
        """One family of metrics for each number that a cache has."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            caches = dict(self._caches)
        families: dict[str, Any] = {}
        for cache, held in caches.items():
            for name, value in held.get_enhanced_stats().items():
                if not isinstance(value, int | float):
                    continue
                if name not in families:
                    kind = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
                    families[name] = kind(
                        f"esper_kernel_cache_{name}",
                        f"{name} of the kernel cache",
                        labels=["cache"],
                    )
                families[name].add_metric([cache], value)
        yield from families.values()

    def describe(self) -> tuple[()]:
        """Nothing, so that registering does not collect."""
        return ()


_lock = threading.Lock()
_collectors: "weakref.WeakKeyDictionary[CollectorRegistry, Collector]" = weakref.WeakKeyDictionary()


def register(cache: "KernelCache", registry: "CollectorRegistry", name: str) -> None:
    """Have a registry collect a cache's statistics for as long as the cache lives.

    Raises:
        InputError: where another cache has the name there.
    """
    with _lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = Collector()
            found: Any = collector
            registry.register(found)
            _collectors[registry] = collector
    collector.add(name, cache)

"""Kernels at hand: in memory, on devices, and in a folder that processes share."""

from esper.cache._cache import KernelCache
from esper.cache._disk import DiskTier
from esper.cache._events import CacheEvent
from esper.cache._source import KernelSource
from esper.contracts import KernelMetadata

EnhancedKernelCache = KernelCache
"""The owner's second name for it."""

__all__ = [
    "CacheEvent",
    "DiskTier",
    "EnhancedKernelCache",
    "KernelCache",
    "KernelMetadata",
    "KernelSource",
]

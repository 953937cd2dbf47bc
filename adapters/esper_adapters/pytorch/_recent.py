"""Kernels that were loaded before, at hand for being loaded again."""

import threading
from collections import OrderedDict

import torch

from esper_adapters.pytorch._kernel import TorchKernel


class RecentKernels:
    """The kernels used last, by id, up to a size in memory."""

    def __init__(self, size_mb: int) -> None:
        if size_mb < 0:
            raise ValueError(f"cache_size_mb must be at least 0, got {size_mb}")
        self.size_mb = size_mb
        self.hits = 0
        self.misses = 0
        self._kernels: OrderedDict[str, TorchKernel] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["RecentKernels"], tuple[int]]:
        return RecentKernels, (self.size_mb,)

    def get(self, kernel_id: str) -> TorchKernel | None:
        """The kernel of an id, or None."""
        with self._lock:
            kernel = self._kernels.get(kernel_id)
            if kernel is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kernels.move_to_end(kernel_id)
            return kernel

    def put(self, kernel_id: str, kernel: TorchKernel) -> None:
        """Keep a kernel, and drop those used longest ago for which there is no room."""
        size = _bytes(kernel)
        with self._lock:
            if kernel_id in self._kernels or size > self.size_mb << 20:
                return
            self._kernels[kernel_id] = kernel
            self._bytes += size
            while self._bytes > self.size_mb << 20:
                _, dropped = self._kernels.popitem(last=False)
                self._bytes -= _bytes(dropped)

    def stats(self) -> dict[str, float | int]:
        """Entries, size in MB and share of hits."""
        with self._lock:
            asked = self.hits + self.misses
            return {
                "entries": len(self._kernels),
                "total_size_mb": self._bytes / (1 << 20),
                "max_size_mb": self.size_mb,
                "hits": self.hits,
                "misses": self.misses,
                "hit_rate": self.hits / asked if asked else 0.0,
            }


def _bytes(kernel: TorchKernel) -> int:
    return sum(torch.as_tensor(p).nbytes for p in kernel.params.values())

"""Kernels that were downloaded lately, in memory.

A content that is named by its digest never changes, so what is kept can only be too much: whether a
kernel was removed is looked at again once the database has changed, or, where nothing tells that,
after `_LOOK_SECONDS`; and at once where it was removed through this process.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, NamedTuple

from cachetools import LRUCache

from esper.errors import ArtifactError

if TYPE_CHECKING:
    from esper.urza.service._state import Service

_LOOK_SECONDS = 2.0


class Kept(NamedTuple):
    """A content, or, where it is large, its size alone."""

    size: int
    data: bytes | None
    looked: float
    """When it was last found to be in the library."""
    changes: int | None
    """What the database told just before that."""


class Blobs:
    """What downloads read from.

    Args:
        service: whose library is read.
    """

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._kept: LRUCache[str, Kept] = LRUCache(
            service.limits.cache_bytes, lambda kept: 200 + len(kept.data or b"")
        )
        self._coming: dict[str, asyncio.Future[Kept]] = {}

    async def find(self, kernel_id: str) -> Kept:
        """A kernel's content, where it is small, and its size.

        Raises:
            KernelNotFoundError: where the library has none.
        """
        kept = self._kept.get(kernel_id)
        changes = self._service.memory.changes()
        same = kept is not None and changes is not None and kept.changes == changes
        if kept is not None and (same or time.monotonic() - kept.looked < _LOOK_SECONDS):
            self._service.metrics.cached.labels("yes").inc()
            return kept
        coming = self._coming.get(kernel_id)
        if coming is None:
            # Of many that ask at once, one asks the library; that one may leave, and the answer
            # comes all the same.
            coming = asyncio.ensure_future(self._look(kernel_id, kept, changes))
            self._coming[kernel_id] = coming
            coming.add_done_callback(lambda done: self._came(kernel_id, done))
        return await asyncio.shield(coming)

    def forget(self, kernel_id: str | None = None) -> None:
        """It was removed; None where any may have been."""
        if kernel_id is None:
            self._kept.clear()
        else:
            self._kept.pop(kernel_id, None)

    async def stream(self, kernel_id: str, start: int, end: int) -> AsyncIterator[bytes]:
        """A part of a large content, read as it is taken."""
        service, left = self._service, end - start
        pieces: Iterator[bytes] = await service.ask(service.library.iter_bytes, kernel_id, start)
        try:
            while left > 0:
                piece = await service.ask(next, pieces, b"")
                if not piece:
                    # Cut, so that what is too short is not taken for the whole.
                    raise ArtifactError(
                        f"the file of kernel {kernel_id[:12]} ends {left} bytes too early"
                    )
                yield piece[:left]
                left -= len(piece)
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                await service.run(close)

    def _came(self, kernel_id: str, done: "asyncio.Future[Kept]") -> None:
        self._coming.pop(kernel_id, None)
        if not done.cancelled():
            done.exception()  # whoever waits for it has it

    async def _look(self, kernel_id: str, kept: Kept | None, changes: int | None) -> Kept:
        service = self._service
        size = (await service.ask(service.library.record, kernel_id)).size_bytes
        if kept is not None:
            data = kept.data
        else:
            service.metrics.cached.labels("no").inc()
            data = None
            if size <= service.limits.cached_bytes:
                data, whole = await service.ask(self._read, kernel_id)
                if not whole:
                    # As it is, for whoever looks for what is wrong with it; and not kept.
                    return Kept(len(data), data, 0.0, None)
        found = Kept(size, data, time.monotonic(), changes)
        if len(data or b"") <= service.limits.cached_bytes:
            self._kept[kernel_id] = found
        return found

    def _read(self, kernel_id: str) -> tuple[bytes, bool]:
        data = self._service.library.read_bytes(kernel_id)
        return data, hashlib.sha256(data).hexdigest() == kernel_id

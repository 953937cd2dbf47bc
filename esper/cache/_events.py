"""What went wrong while loading went on."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from esper.cache._forks import renew_at_fork

_KEPT = 256

Kind = Literal["damaged", "disk", "library", "incompatible", "prefetch"]


class CacheEvent(NamedTuple):
    """Something went wrong, and loading went on."""

    kind: Kind
    """`damaged`: a file, which was removed. `disk`: a file was not read or written. `library`: it
    could not be asked. `incompatible`: a kernel does not fit. `prefetch`: one brought nothing."""
    kernel_id: str
    detail: str


class Events:
    """The last events, and who is told of each."""

    def __init__(self, listener: Callable[[CacheEvent], None] | None) -> None:
        self.listener = listener
        self.listener_failures = 0
        self._lock = threading.Lock()
        self._last: deque[CacheEvent] = deque(maxlen=_KEPT)
        self._here = threading.local()
        renew_at_fork(self)

    def forked(self) -> None:
        """Whoever was telling has stayed in the parent."""
        self._lock = threading.Lock()

    def keep(self, kind: Kind, kernel_id: str, detail: object) -> CacheEvent:
        """Keep an event, which is still to be told."""
        event = CacheEvent(kind, kernel_id, str(detail))
        with self._lock:
            self._last.append(event)
        return event

    def report(self, kind: Kind, kernel_id: str, detail: object) -> None:
        """Keep an event and pass it on."""
        self.tell([self.keep(kind, kernel_id, detail)])

    def tell(self, events: Iterable[CacheEvent]) -> None:
        """Pass events on; to be called outside of locks, and of what others wait for."""
        # What a listener does itself is not told to it, or it might hear itself for ever.
        if self.listener is None or getattr(self._here, "telling", False):
            return
        self._here.telling = True
        try:
            for event in events:
                try:
                    self.listener(event)
                except Exception:
                    # Loading does not end because nobody can be told.
                    with self._lock:
                        self.listener_failures += 1
        finally:
            self._here.telling = False

    def last(self) -> list[CacheEvent]:
        """The last 256, oldest first."""
        with self._lock:
            return list(self._last)

"""Fetching what is expected, by one thread in the background."""

import atexit
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache

from esper.cache._forks import renew_at_fork

_NICENESS = 10
"""Of the thread, on top of its process's, where the system gives threads one of their own."""

_PATIENCE = 5.0
"""Seconds for which an exit waits for what is being fetched."""


class _Queue:
    """Ids that are still to be fetched, in order, each once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.ids: OrderedDict[str, None] = OrderedDict()
        self.dropped = 0
        self.at: str | None = None
        self.stopped = False
        self.changed = threading.Condition()
        renew_at_fork(self)

    def forked(self) -> None:
        """What waits is fetched by the parent."""
        self.changed = threading.Condition()
        self.ids.clear()
        self.at = None

    def take(self) -> str | None:
        """The next id, when there is one; None when it is over."""
        with self.changed:
            self.at = None
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.ids or self.stopped)
            if self.stopped:
                return None
            self.at, _ = self.ids.popitem(last=False)
            return self.at

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.ids.clear()
            self.changed.notify_all()


def _serve(queue: _Queue, fetch: "weakref.WeakMethod[Callable[[str], object]]") -> None:
    # Elsewhere a priority is the whole process's.
    if sys.platform == "linux":
        with suppress(OSError):
            own = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, own) + _NICENESS
            os.setpriority(os.PRIO_PROCESS, own, nice)
    while (kernel_id := queue.take()) is not None:
        alive = fetch()
        if alive is None:
            return
        alive(kernel_id)
        # Otherwise the thread would keep alive what it waits for.
        del alive


class Prefetcher:
    """Calls a method with ids that were submitted, one after the other.

    The thread starts with the first id, and ends with the object that the method is of, when
    it is stopped, or with the interpreter. It is a daemon of low priority.

    Args:
        fetch: a method that takes an id and raises nothing; its object is not kept alive.
        most: ids that may wait; further ones are dropped.
    """

    def __init__(self, fetch: Callable[[str], object], most: int = 16) -> None:
        self._queue = _Queue(most)
        self._fetch = weakref.WeakMethod(fetch)
        self._thread: threading.Thread | None = None
        self._finalizer = weakref.finalize(fetch.__self__, self._queue.stop)  # type: ignore[attr-defined]
        self._finalizer.atexit = False

    def submit(self, kernel_id: str) -> bool:
        """Have an id fetched; returns at once, False where it is dropped or waits already."""
        queue = self._queue
        with queue.changed:
            if queue.stopped or kernel_id in queue.ids or kernel_id == queue.at:
                return False
            if len(queue.ids) >= queue.most:
                queue.dropped += 1
                return False
            queue.ids[kernel_id] = None
            if self._thread is None:
                _stop_at_exit()
                _started.add(weakref.ref(self, _started.discard))
            # After a fork the thread is gone.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=_serve,
                    args=(queue, self._fetch),
                    name="esper-prefetch",
                    daemon=True,
                )
                self._thread.start()
            queue.changed.notify_all()
        return True

    @property
    def dropped(self) -> int:
        """Ids for which there was no room."""
        return self._queue.dropped

    @property
    def waiting(self) -> int:
        """Ids that are still to be fetched."""
        return len(self._queue.ids)

    def cancel(self) -> int:
        """Forget what waits; how many. What is being fetched is fetched."""
        with self._queue.changed:
            count = len(self._queue.ids)
            self._queue.ids.clear()
            self._queue.changed.notify_all()
        return count

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to fetch; whether it is so."""
        queue = self._queue
        with queue.changed:
            return queue.changed.wait_for(lambda: not queue.ids and queue.at is None, timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Forget what waits, and wait for what is being fetched. Nothing is fetched later."""
        self._queue.stop()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)


_started: "set[weakref.ref[Prefetcher]]" = set()


@cache
def _stop_at_exit() -> None:
    # Once, and not before a thread has begun: what is registered later runs earlier.
    atexit.register(_stop)


def _stop() -> None:
    for started in list(_started):
        prefetcher = started()
        if prefetcher is not None:
            prefetcher.stop(_PATIENCE)

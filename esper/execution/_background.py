"""Work that is done once: in the background, or sooner by whoever needs it.

One thread serves the whole process, because what it does is compiling, and two
compilations at once only slow each other. It starts with the first work.
"""

import atexit
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Work(Generic[Result]):
    """A result that the first thread to `run` makes; all others wait for that one."""

    def __init__(self, make: Callable[[], Result]) -> None:
        self._make: Callable[[], Result] | None = make
        self._begun = threading.Lock()
        self.result: Future[Result] = Future()
        """What `make` returned or raised; cancelled where it never will."""

    def _begin(self) -> Callable[[], Result] | None:
        if not self._begun.acquire(blocking=False):
            return None
        # What has begun holds on to nothing that it was made from.
        make, self._make = self._make, None
        return make

    def run(self) -> None:
        """Do the work here, unless a thread has begun it or it was cancelled."""
        make = self._begin()
        if make is None:
            return
        try:
            self.result.set_result(make())
        except Exception as error:
            self.result.set_exception(error)
        except BaseException:
            # An interruption is for this thread alone; others may begin anew.
            self.result.cancel()
            raise

    def cancel(self) -> None:
        """Give up what has not begun."""
        if self._begin() is not None:
            self.result.cancel()


SWITCH_INTERVAL = 1e-4
"""Seconds for which a thread may hold the interpreter while work is done in the background."""


@contextmanager
def _yielding() -> Iterator[None]:
    """Let others have the interpreter sooner than they would, and for longer.

    Tracing is Python, and Python hands the interpreter over every 5 ms: a training loop asks
    for it several times a step, and would wait that long each time. It also makes so many
    objects that a full collection falls due, 50 to 100 ms long; what was there before is
    kept out of it.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_INTERVAL))
    own = sys.getswitchinterval()  # in whole microseconds
    # Unless the program has frozen objects itself.
    freeze = gc.get_freeze_count() == 0
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()
        # Unless somebody else has set another meanwhile.
        if sys.getswitchinterval() == own:
            sys.setswitchinterval(before)


class Background:
    """A thread that runs work in the order in which it is submitted.

    When the interpreter exits, the work that it is at is finished and the rest left.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Work] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(self, work: Work) -> None:
        """Run it after what was submitted before; returns at once."""
        with self._lock:
            # After a fork the thread is gone.
            if self._thread is None or not self._thread.is_alive():
                # A daemon, so that the exit reaches `_stop` before it waits for threads.
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
                atexit.register(self._stop, self._thread)
        self._queue.put(work)

    def _serve(self) -> None:
        while not self._stopping:
            work = self._queue.get()
            with _yielding():
                work.run()

    def _stop(self, thread: threading.Thread) -> None:
        # A thread that is inside XLA while the interpreter is taken down would crash it.
        self._stopping = True
        self._queue.put(Work(lambda: None))
        thread.join()


COMPILER = Background("esper-compile")

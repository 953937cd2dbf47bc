"""Ending in two steps: what is begun may go on for a while, and then no longer."""

import threading
import time
from collections.abc import Callable

from esper.tezzeret.service._bell import Bell


class Ending:
    """Asked by anybody, the handler of a signal among them; carried out by a thread.

    Args:
        grace_seconds: between the two steps.
        step: called with False for the first step, and with True for the second, which comes when
            the grace is over or it was asked for again.
    """

    def __init__(self, grace_seconds: float, step: Callable[[bool], object]) -> None:
        self.grace_seconds = grace_seconds
        self.asked = False
        self.moment = float("inf")
        """When the second step comes, in seconds of `time.monotonic`."""
        self._step = step
        self._bell = Bell()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="esper-ending", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """End; once more ends at once."""
        self._bell.ring()

    def close(self) -> None:
        """It has ended."""
        self._closed = True
        self._bell.ring()
        self._thread.join()

    def _run(self) -> None:
        self._bell.wait(threading.TIMEOUT_MAX)
        if self._closed:
            return
        self.asked = True
        self.moment = time.monotonic() + self.grace_seconds
        self._step(False)
        self._bell.wait(self.grace_seconds)
        if not self._closed:
            self.moment = time.monotonic()
            self._step(True)

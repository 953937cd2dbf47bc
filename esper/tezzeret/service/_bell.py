"""A wait that somebody else may end: another thread, or the handler of a signal."""

import queue


class Bell:
    """Rung by whoever likes, and heard by the one who waits.

    It has no lock that the handler of a signal could find taken by the thread it interrupts, as a
    `threading.Event` has.
    """

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """End the wait that there is, or the next one."""
        self._rings.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until it is rung; however often it was, it counts once.

        Returns:
            Whether it was rung.
        """
        try:
            self._rings.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return False
        self.heard()
        return True

    def heard(self) -> bool:
        """Whether it was rung since it was heard last."""
        found = False
        while not self._rings.empty():
            self._rings.get()
            found = True
        return found

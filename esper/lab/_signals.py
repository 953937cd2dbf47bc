"""Waiting for a while, or until a signal comes."""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """What this process was told while `listening`.

    Attributes:
        asked: the first signal to end that came; None before.
        impatient: Ctrl-C came twice. Other signals may come twice because they are sent to a whole
            group and passed on within it.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.impatient = False
        self._interrupts = 0
        self._read = -1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While signals to end are counted, and do nothing else."""
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = {number: signal.signal(number, self._note) for number in _ENDING}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        waker = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._read = read
        try:
            yield
        finally:
            signal.set_wakeup_fd(waker)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(read)
            os.close(write)

    def wait(self, seconds: float | None) -> None:
        """Until a signal comes, a child's end among them, or so many seconds have gone."""
        if select.select([self._read], [], [], seconds)[0]:
            try:
                os.read(self._read, 4096)
            except BlockingIOError:
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = signal.Signals(number)
        self._interrupts += number == signal.SIGINT
        self.impatient = self._interrupts > 1

"""A thread that writes what callers log, so that they never wait for a terminal or a disk."""

import contextlib
import logging
import os
import threading
import time
from queue import Empty, SimpleQueue
from typing import TextIO

from esper.logs._formats import Format
from esper.logs._record import Pending, entry, pending
from esper.logs._redact import Redaction

_AT_ONCE = 256


class QueueHandler(logging.Handler):
    """Leaves records in a bounded queue; one for which there is no room is dropped, and counted."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.queue: SimpleQueue[Pending | None] = SimpleQueue()
        self.dropped = 0
        self._capacity = capacity

    def emit(self, record: logging.LogRecord) -> None:
        """Leave one record; logging calls it with this handler's lock held."""
        if self.queue.qsize() >= self._capacity:
            self.dropped += 1
            return
        try:
            self.queue.put(pending(record))
        except Exception:  # nothing that is logged may stop who logs it
            self.dropped += 1


class Writer:
    """Writes what is in a handler's queue, in a thread of its own.

    Args:
        stream: where to; one with a file descriptor is written to without its buffer, because a
            thread that waits for a terminal would hold the buffer's lock when the process ends.
    """

    def __init__(
        self, handler: QueueHandler, form: Format, stream: TextIO, redaction: Redaction
    ) -> None:
        self.written = 0
        self.failed = 0
        """Records that could not be written."""
        self._handler = handler
        self._form = form
        self._stream = stream
        self._redaction = redaction
        self._told = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-logs", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Write what is waiting, and end; False where that took too long."""
        self._handler.queue.put(None)
        self._thread.join(seconds)
        return self._ended.is_set()

    def _run(self) -> None:
        ends = False
        while not ends:
            batch = [self._handler.queue.get()]
            with contextlib.suppress(Empty):
                while len(batch) < _AT_ONCE:
                    batch.append(self._handler.queue.get_nowait())
            ends = None in batch
            records = [own for own in batch if own is not None]
            text = "".join(map(self._text, records)) + self._about_dropped()
            try:
                self._write(text)
                self.written += len(records)
            except (OSError, ValueError):  # a pipe or a file that was closed, a full disk
                self.failed += len(records)
        self._ended.set()

    def _text(self, record: Pending) -> str:
        try:
            return self._form(entry(record, self._redaction))
        except Exception as error:  # the thread has to go on
            return f"a record of {record.logger} could not be written: {type(error).__name__}\n"

    def _about_dropped(self) -> str:
        dropped, before = self._handler.dropped, self._told
        if dropped == before:
            return ""
        self._told = dropped
        told = Pending(
            time.time(),
            "WARNING",
            "esper.logs",
            "records were dropped, because they came faster than they could be written",
            {"dropped": dropped - before, "dropped_in_all": dropped},
            None,
        )
        return self._text(told)

    def _write(self, text: str) -> None:
        if not text:
            return
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            self._stream.write(text)
            self._stream.flush()
            return
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        while left:
            left = left[os.write(descriptor, left) :]

"""One transaction for all that waits to be written, however many threads publish."""

import threading
from collections.abc import Callable, Sequence

from esper.oona._store import Record


class _Batch:
    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.written = False
        self.error: BaseException | None = None


class GroupCommit:
    """Lets the thread whose turn it is write what others have brought meanwhile.

    Args:
        turn: held by who writes.
        write: writes batches in one transaction, and gives for each why it was refused, or None.
    """

    def __init__(
        self,
        turn: threading.Lock,
        write: Callable[[Sequence[Sequence[Record]]], list[Exception | None]],
    ) -> None:
        self._turn = turn
        self._write = write
        self._lock = threading.Lock()
        self._waiting: list[_Batch] = []

    def submit(self, records: Sequence[Record]) -> None:
        """Return when the batch is written, by this thread or another one.

        Raises:
            Exception: what writing it, or all of them, raised.
        """
        own = _Batch(records)
        with self._lock:
            self._waiting.append(own)
        with self._turn:
            if not own.written:
                self._write_all()
        if own.error is not None:
            raise own.error

    def _write_all(self) -> None:
        with self._lock:
            batches, self._waiting = self._waiting, []
        errors: Sequence[BaseException | None]
        try:
            errors = self._write([batch.records for batch in batches])
        except BaseException as error:
            errors = [error] * len(batches)
        for batch, error in zip(batches, errors, strict=True):
            batch.written, batch.error = True, error

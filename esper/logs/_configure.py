"""Where records go: from when they are configured until that is stopped."""

import atexit
import logging
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self, TextIO

from esper.logs._formats import Format, as_json, as_plain, rich_format
from esper.logs._redact import Redaction
from esper.logs._writer import QueueHandler, Writer

Kind = Literal["auto", "rich", "json", "plain"]
Level = Literal["debug", "info", "warning", "error"]

CAPACITY = 10_000
_PATIENCE = 2.0
"""Seconds that the end of a process waits for what was logged."""


class Logs:
    """Records of some loggers on their way to a stream; a context manager.

    While it is there, these loggers hand nothing to others above them.
    """

    def __init__(
        self, loggers: Sequence[str], handler: QueueHandler, writer: Writer, level: int
    ) -> None:
        self._handler = handler
        self._writer = writer
        self._before = [(own, own.level, own.propagate) for own in map(logging.getLogger, loggers)]
        for own, _, _ in self._before:
            own.addHandler(handler)
            own.setLevel(level)
            own.propagate = False
        self._stopped = False
        atexit.register(self.stop)

    @property
    def dropped(self) -> int:
        """Records for which there was no room."""
        return self._handler.dropped

    @property
    def written(self) -> int:
        """Records that were written."""
        return self._writer.written

    @property
    def failed(self) -> int:
        """Records that could not be written: the disk is full, or nobody reads any more."""
        return self._writer.failed

    def stop(self, seconds: float = _PATIENCE) -> bool:
        """Write what is waiting, and give the loggers back as they were.

        Returns:
            Whether all was written within that time.
        """
        if self._stopped:
            return True
        self._stopped = True
        atexit.unregister(self.stop)
        for own, level, propagate in self._before:
            own.removeHandler(self._handler)
            own.setLevel(level)
            own.propagate = propagate
        return self._writer.stop(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def configure_logs(
    format: Kind = "auto",
    level: Level = "info",
    *,
    capacity: int = CAPACITY,
    stream: TextIO | None = None,
    loggers: Sequence[str] = ("esper",),
    secrets: Sequence[str] = (),
) -> Logs:
    """Write what is logged from now on.

    Args:
        format: `auto` is rich on a terminal, and plain elsewhere.
        capacity: records that may wait; what comes beyond is dropped, and counted.
        stream: where to; by default standard error.
        loggers: whose records; those of loggers below them too.
        secrets: values that are never written, wherever they stand.

    Raises:
        InputError: for an unknown format or level, or no room.
    """
    known = {"auto", "rich", "json", "plain"}
    levels = logging.getLevelNamesMapping()
    if format not in known or level.upper() not in levels or capacity < 1:
        from esper.errors import InputError

        raise InputError(
            f"logs take a format of {', '.join(sorted(known))}, a level of debug, info, warning,"
            f" error, and a capacity from 1; got {format!r}, {level!r}, {capacity!r}"
        )
    target = sys.stderr if stream is None else stream
    handler = QueueHandler(capacity)
    writer = Writer(handler, _form(format, target), target, Redaction(tuple(secrets)))
    return Logs(loggers, handler, writer, levels[level.upper()])


def _form(format: Kind, stream: TextIO) -> Format:
    if format == "json":
        return as_json
    on_terminal = bool(getattr(stream, "isatty", lambda: False)())
    return rich_format() if format == "rich" or (format == "auto" and on_terminal) else as_plain

"""Connections that do not wait for ever: neither for a request's head nor for a reader.

uvicorn gives up on a connection that is silent after an answer, and on no other.
"""

import array
import asyncio
import contextlib
import fcntl
import functools
import termios
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from esper.urza.service._limits import Limits

_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"  # to no one
)


class Connection(H11Protocol):
    """uvicorn's connection, with a time for heads and one for readers.

    That of h11, which bounds the size of heads; the one of httptools does not.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _cancelled(self._head)
        elif self._head is None:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stalled = _cancelled(self._head), _cancelled(self._stalled)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self._limits.header_seconds, self._late)

    def _late(self) -> None:
        self._head = None
        if not self.transport.is_closing():
            self.transport.write(_LATE)
            self.transport.close()

    def _await_reader(self) -> None:
        waiting = self._waiting()
        self._stalled = self.loop.call_later(
            self._limits.idle_seconds, self._look_at_reader, waiting
        )

    def _look_at_reader(self, before: int) -> None:
        self._stalled = None
        if self._waiting() < before:
            # Slow, and not silent: writing goes on only once most of what waits is taken.
            self._await_reader()
        else:
            # What was to be sent is thrown away: whoever does not read it would keep it in memory.
            self.transport.abort()

    def _waiting(self) -> int:
        """Bytes that the reader has not taken, here and in the system's buffer of the socket."""
        held = array.array("i", [0])
        # The system takes more from here only once a large part of its own buffer is free.
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, held)
        return self.transport.get_write_buffer_size() + held[0]


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def connections(limits: Limits) -> Any:
    """What uvicorn makes connections by."""
    return functools.partial(Connection, limits=limits)

"""The whole lines of a file that another process writes, as they come."""

import os
from pathlib import Path
from typing import NamedTuple

CHUNK = 8 << 20
"""Bytes that are read at a time: a long file is read in pieces, and others have their turn."""

_REMEMBERED = 256
"""Bytes before the place reached, by which a file that was written anew is told."""


class Line(NamedTuple):
    """One line without its newline."""

    number: int
    """From 1."""
    data: bytes


class Lines(NamedTuple):
    """What was read at one time."""

    fresh: list[Line]
    anew: bool
    """The file is another one, or was cut: forget the lines read before; these begin at its
    first."""
    more: bool
    """There is more to read at once."""


class Tail:
    """A place in a file that grows.

    A last line without its newline is waited for. A file that is not there has no lines. One
    that shrank, was replaced, or no longer holds what stood before the place is read anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self._lines = 0
        self._before = b""
        self._inode: int | None = None

    def read(self, chunk: int = CHUNK) -> Lines:
        """The lines that have become whole since the last time, at most about `chunk` bytes.

        Raises:
            OSError: where the file is there and cannot be read.
        """
        try:
            file = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            gone = self._inode is not None
            self._forget()
            return Lines([], gone, False)
        with file:
            status = os.fstat(file.fileno())
            anew = self._inode is not None and not self._same(file.fileno(), status)
            if anew:
                self._forget()
            self._inode = status.st_ino
            if status.st_size <= self._offset:
                return Lines([], anew, False)
            data = os.pread(file.fileno(), chunk, self._offset)
            end = data.rfind(b"\n") + 1
            # A line may be longer than a chunk.
            while not end and len(data) < status.st_size - self._offset:
                more = os.pread(file.fileno(), chunk, self._offset + len(data))
                if not more:
                    break
                end = more.rfind(b"\n") + 1
                end += len(data) if end else 0
                data += more
        whole = data[:end]
        pieces = whole.split(b"\n")[:-1]
        fresh = [Line(self._lines + i, piece) for i, piece in enumerate(pieces, start=1)]
        self._lines += len(pieces)
        self._offset += end
        self._before = (self._before + whole)[-_REMEMBERED:]
        return Lines(fresh, anew, end > 0 and status.st_size > self._offset)

    def _same(self, descriptor: int, status: os.stat_result) -> bool:
        """Whether the file is the one that was read, and still begins as it did."""
        if status.st_ino != self._inode or status.st_size < self._offset:
            return False
        start = self._offset - len(self._before)
        return os.pread(descriptor, len(self._before), start) == self._before


def last_line(path: Path, limit: int = 64 << 20) -> bytes:
    """The last whole line of a file, read from its end; empty where there is none.

    Raises:
        OSError: where the file is there and cannot be read.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return b""
    with file:
        end = file.seek(0, os.SEEK_END)
        data, start, step = b"", end, 1 << 16
        while start > 0 and len(data) < limit:
            begin = max(0, start - step)
            data = os.pread(file.fileno(), start - begin, begin) + data
            start, step = begin, step * 4
            whole = data[: data.rfind(b"\n") + 1]
            before = whole[:-1].rfind(b"\n")
            if whole and (before >= 0 or start == 0):
                return whole[before + 1 : -1]
    return b""

"""A kernel that comes piece by piece, and goes on where it was cut."""

from collections.abc import Mapping

from esper.errors import InputError, LibraryError, ServiceUnavailableError
from esper.recovery._effects import Call, Effects, Wait
from esper.urza.client._exchange import Exchange
from esper.urza.client._messages import Ask, Broken, Opened


class Download:
    """The content of a kernel from some byte on.

    Args:
        exchange: with the service.
        path: of the content.
        kernel_id: whose it is; its ETag.
        start: first byte.
    """

    def __init__(self, exchange: Exchange, path: str, kernel_id: str, start: int) -> None:
        self._exchange = exchange
        self._path = path
        self._id = kernel_id
        self._at = start
        self._end: int | None = None
        self._skip = 0
        self._opened: Opened | None = None
        self.resumed = 0
        """How often it was cut, and has gone on."""

    def open(self) -> Effects[None]:
        """Ask for what has not come yet.

        Raises:
            KernelNotFoundError: where there is no such kernel.
            InputError: where it begins beyond the end.
        """
        headers: dict[str, str] = {}
        if self._at:
            headers = {"Range": f"bytes={self._at}-", "If-Range": f'"{self._id}"'}
        ask = Ask("GET", self._path, headers=headers)
        opened = yield from self._exchange.open(ask, taken=(416,))
        if opened.status == 416:
            size = int(opened.headers.get("content-range", "0").rpartition("/")[2] or 0)
            yield Call(opened.close)
            if self._at > size:
                raise beyond(self._id, size, self._at)
            # It begins where the content ends.
            self._end = self._at
            return
        self._opened = opened
        length = _number(opened.headers, "content-length")
        # What does not know of parts sends the whole.
        self._skip = self._at if opened.status == 200 else 0
        if length is not None:
            self._end = length + (self._at if opened.status == 206 else 0)

    def piece(self) -> Effects[bytes]:
        """The next piece; nothing at the end.

        Raises:
            ServiceUnavailableError: where it was cut, and nothing more comes.
        """
        delays, cuts = self._exchange.delays(), 0
        while True:
            try:
                if self._opened is None and self._at != self._end:
                    yield from self.open()
                if self._opened is None:
                    return b""
                piece = yield Call(self._opened.piece)
                if not piece and self._end is not None and self._at < self._end:
                    raise Broken(f"it ended at byte {self._at} of {self._end}", sent=True)
            except Broken as broken:
                yield from self.close()
                cuts += 1
                if cuts >= self._exchange.retry.attempts:
                    raise ServiceUnavailableError(
                        f"kernel {self._id[:12]} could not be downloaded from"
                        f" {self._exchange.url}: {broken.reason}, {cuts} times. Try again later."
                    ) from broken
                self.resumed += 1
                yield Wait(next(delays))
                continue
            if self._skip and piece:
                skipped = min(self._skip, len(piece))
                self._skip -= skipped
                piece = piece[skipped:]
                if not piece:
                    continue
            self._at += len(piece)
            if self._end is not None and self._at > self._end:
                raise LibraryError(
                    f"{self._exchange.url} sent more than the {self._end} bytes of kernel"
                    f" {self._id[:12]}"
                )
            return piece

    def close(self) -> Effects[None]:
        """Let go of the connection."""
        opened, self._opened = self._opened, None
        if opened is not None:
            yield Call(opened.close)


def beyond(kernel_id: str, size: int, start: int) -> InputError:
    """What is wrong with a part of a content that lies outside of it."""
    return InputError(
        f"kernel {kernel_id[:12]} has {size} bytes and cannot be read from byte {start} on"
    )


def _number(headers: Mapping[str, str], name: str) -> int | None:
    told = headers.get(name, "")
    return int(told) if told.isascii() and told.isdecimal() else None

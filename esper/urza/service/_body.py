"""Bodies of requests, taken in under bounds of size and time.

Who sends slowly, or more than was agreed, holds up nobody else and fills nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from starlette.requests import Request

from esper.contracts import Data, read
from esper.errors import InputError, ServiceUnavailableError
from esper.urza.service._limits import Limits
from esper.urza.service._problems import RefusedError

T = TypeVar("T", bound=Data)
Message = MutableMapping[str, Any]

_DRAINED_STRANGER = 256 << 10
"""Bytes that are read and thrown away of one who is refused, so that the refusal is heard."""
_DRAIN_SECONDS = 3.0


class CutShortError(Exception):
    """Whoever asks has gone before the request was whole."""


class Body:
    """The body of one request; it stands in the place of the server's `receive`.

    Args:
        request: the request, of which nothing was read.
        limits: of the service.
        most: bytes that it may have.
    """

    def __init__(self, request: Request, limits: Limits, most: int) -> None:
        self._receive: Callable[[], Awaitable[Message]] = request.receive
        self._headers = request.headers
        self._limits = limits
        self._most = most
        self._taken = 0
        self._began: float | None = None
        self.ended = not (
            "transfer-encoding" in self._headers
            or self._headers.get("content-length", "0").strip() != "0"
        )

    def check(self) -> None:
        """Refuse what its headers tell to be too large, or not as it is.

        Raises:
            RefusedError: with 413, or 415.
        """
        encoding = self._headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise RefusedError(
                415,
                InputError,
                f"a body with the Content-Encoding {encoding[:40]!r} is refused: send it as it is,"
                " without Content-Encoding",
                headers={"Accept-Encoding": "identity"},
            )
        told = self._headers.get("content-length", "0").strip()
        if told.isdecimal() and int(told[:20]) > self._most:
            raise self._too_large(f"{told[:20]} bytes")

    async def __call__(self) -> Message:
        """The next part, as `receive` gives it."""
        if self.ended:
            return await self._receive()
        clock = asyncio.get_running_loop().time
        if self._began is None:
            self._began = clock()
        # All in all it may take longer, the more of it has come.
        end = self._began + self._limits.idle_seconds + self._taken / self._limits.slowest
        wait = min(self._limits.idle_seconds, end - clock())
        try:
            async with asyncio.timeout(wait):
                message = await self._receive()
        except TimeoutError as error:
            raise RefusedError(
                408,
                ServiceUnavailableError,
                f"the body came too slowly: {self._taken} bytes in"
                f" {clock() - self._began:.1f} s; expected {self._limits.slowest} bytes a second",
            ) from error
        if message["type"] == "http.request":
            self._taken += len(message.get("body", b""))
            self.ended = not message.get("more_body", False)
            if self._taken > self._most:
                raise self._too_large(f"more than {self._most} bytes")
        return message

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, part by part.

        Raises:
            CutShortError: where it is not whole, and never will be.
            RefusedError: where it is too large or too slow.
        """
        while True:
            message = await self()
            if message["type"] != "http.request":
                raise CutShortError
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return

    async def data(self, model: type[T]) -> T:
        """The body as data.

        Raises:
            SchemaVersionError: where a newer version of Esper wrote it.
            InputError: for what is no such data.
        """
        kind = self._headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusedError(
                415,
                InputError,
                f"expected a {model.__name__} as application/json, got a body of the type"
                f" {kind[:80] or 'that no Content-Type tells'!r}",
            )
        return read(model, b"".join([part async for part in self.parts()]))

    async def drain(self, *, known: bool) -> None:
        """Read the rest and throw it away, for a while.

        Args:
            known: whether it is sent by somebody who may send.
        """
        self._taken, self._began = 0, None
        self._most = self._limits.upload_bytes if known else _DRAINED_STRANGER
        with contextlib.suppress(RefusedError, TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self.ended:
                    if (await self())["type"] != "http.request":
                        return

    def _too_large(self, came: str) -> RefusedError:
        return RefusedError(
            413,
            InputError,
            f"the body has {came}, and may have at most {self._most}",
        )

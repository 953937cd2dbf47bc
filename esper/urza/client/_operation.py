"""Methods written once, and had twice: with an event loop and without.

A method is written as effects. On a client that drives them in the thread it returns the result,
and on one of an event loop what is to be awaited for it.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from esper.recovery._effects import Effects
from esper.urza.client._download import Download

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class DrivesHere(Protocol):
    """A client that does what is asked in the thread that asks."""

    def drive_here(self, effects: Effects[Any]) -> Any:
        """Do it."""
        ...


class DrivesInLoop(Protocol):
    """A client that does what is asked in an event loop."""

    def drive_in_loop(self, effects: Effects[Any]) -> Coroutine[Any, Any, Any]:
        """Do it."""
        ...


class operation(Generic[P, T]):
    """A method whose effects the client drives as it does."""

    def __init__(self, function: Callable[Concatenate[Any, P], Effects[T]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type | None = None) -> "operation[P, T]": ...
    @overload
    def __get__(self, client: DrivesHere, owner: type | None = None) -> Callable[P, T]: ...
    @overload
    def __get__(
        self, client: DrivesInLoop, owner: type | None = None
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type | None = None) -> Any:
        if client is None:
            return self
        drive = getattr(client, "drive_here", None) or client.drive_in_loop
        function = self.function

        @functools.wraps(function)
        def bound(*args: P.args, **kwargs: P.kwargs) -> Any:
            return drive(function(client, *args, **kwargs))

        return bound


class Pieces(Iterator[bytes]):
    """What a download gives, piece by piece; its connection is let go of with it.

    No generator, because one that was never asked for anything closes nothing.

    Args:
        client: drives the download.
        download: an open one.
    """

    def __init__(self, client: DrivesHere, download: Download) -> None:
        self._client = client
        self._download: Download | None = download

    def __next__(self) -> bytes:
        if self._download is None:
            raise StopIteration
        try:
            piece = self._client.drive_here(self._download.piece())
        except BaseException:
            self.close()
            raise
        if not piece:
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        """Let go of the connection; nothing more comes."""
        download, self._download = self._download, None
        if download is not None:
            self._client.drive_here(download.close())

    def __del__(self) -> None:
        self.close()


class AsyncPieces(AsyncIterator[bytes]):
    """As `Pieces`, in an event loop.

    Args:
        client: drives the download.
        download: an open one.
    """

    def __init__(self, client: DrivesInLoop, download: Download) -> None:
        self._client = client
        self._download: Download | None = download
        self._loop = asyncio.get_running_loop()

    async def __anext__(self) -> bytes:
        if self._download is None:
            raise StopAsyncIteration
        try:
            piece = await self._client.drive_in_loop(self._download.piece())
        except BaseException:
            await self.aclose()
            raise
        if not piece:
            await self.aclose()
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Let go of the connection; nothing more comes."""
        download, self._download = self._download, None
        if download is not None:
            await self._client.drive_in_loop(download.close())

    def __del__(self) -> None:
        # Whoever drops it cannot wait, and may be the collector in any thread.
        download, client, loop = self._download, self._client, self._loop
        if download is not None and not loop.is_closed():
            loop.call_soon_threadsafe(
                lambda: loop.create_task(client.drive_in_loop(download.close()))
            )


class streamed(Generic[P]):
    """A method that opens a download, whose pieces the client gives one by one."""

    def __init__(self, function: Callable[Concatenate[Any, P], Effects[Download]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type | None = None) -> "streamed[P]": ...
    @overload
    def __get__(self, client: DrivesHere, owner: type | None = None) -> Callable[P, Pieces]: ...
    @overload
    def __get__(
        self, client: DrivesInLoop, owner: type | None = None
    ) -> Callable[P, Coroutine[Any, Any, AsyncPieces]]: ...
    def __get__(self, client: Any, owner: type | None = None) -> Any:
        if client is None:
            return self
        function = self.function

        @functools.wraps(function)
        def here(*args: P.args, **kwargs: P.kwargs) -> Pieces:
            return Pieces(client, client.drive_here(function(client, *args, **kwargs)))

        @functools.wraps(function)
        async def in_loop(*args: P.args, **kwargs: P.kwargs) -> AsyncPieces:
            opened = await client.drive_in_loop(function(client, *args, **kwargs))
            return AsyncPieces(client, opened)

        return here if hasattr(client, "drive_here") else in_loop

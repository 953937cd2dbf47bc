"""Methods written once, and had twice: with an event loop and without.

A method is written as effects. On a client that drives them in the thread it returns the result,
and on one of an event loop what is to be awaited for it.
"""

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


class streamed(Generic[P]):
    """A method that opens a download, whose pieces the client gives one by one."""

    def __init__(self, function: Callable[Concatenate[Any, P], Effects[Download]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type | None = None) -> "streamed[P]": ...
    @overload
    def __get__(
        self, client: DrivesHere, owner: type | None = None
    ) -> Callable[P, Iterator[bytes]]: ...
    @overload
    def __get__(
        self, client: DrivesInLoop, owner: type | None = None
    ) -> Callable[P, Coroutine[Any, Any, AsyncIterator[bytes]]]: ...
    def __get__(self, client: Any, owner: type | None = None) -> Any:
        if client is None:
            return self
        function = self.function

        @functools.wraps(function)
        def here(*args: P.args, **kwargs: P.kwargs) -> Iterator[bytes]:
            return _pieces(client, client.drive_here(function(client, *args, **kwargs)))

        @functools.wraps(function)
        async def in_loop(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[bytes]:
            opened = await client.drive_in_loop(function(client, *args, **kwargs))
            return _async_pieces(client, opened)

        return here if hasattr(client, "drive_here") else in_loop


def _pieces(client: DrivesHere, download: Download) -> Iterator[bytes]:
    try:
        while piece := client.drive_here(download.piece()):
            yield piece
    finally:
        client.drive_here(download.close())


async def _async_pieces(client: DrivesInLoop, download: Download) -> AsyncIterator[bytes]:
    try:
        while piece := await client.drive_in_loop(download.piece()):
            yield piece
    finally:
        await client.drive_in_loop(download.close())

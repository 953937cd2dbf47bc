"""The two transports: httpx with an event loop, and without one.

They hold no decision; whatever is decided is decided once, for both.
"""

import os
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx

from esper.urza.client._messages import Answer, Ask, Broken, DistrustedError

_PIECE = 256 << 10
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class Settings:
    """What both make their clients of.

    Args:
        url: of the service.
        headers: of every request.
        timeout: seconds that each step may take.
        verify: the certificates to believe in, or whether any are asked for.
        connections: most at once.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout: float,
        verify: ssl.SSLContext | bool,
        connections: int,
    ) -> None:
        self.options: dict[str, Any] = {
            "base_url": url,
            "headers": dict(headers),
            "timeout": httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            "verify": verify,
            "limits": httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections
            ),
            # The token goes to nobody but whom it was given for.
            "follow_redirects": False,
        }


def _request(client: Any, ask: Ask) -> httpx.Request:
    headers = dict(ask.headers)
    if ask.content is not None:
        headers["Content-Type"] = ask.kind
    return client.build_request(
        ask.method,
        ask.path,
        params=list(ask.parameters) or None,
        content=ask.content,
        headers=headers,
    )


def _broken(error: Exception) -> Broken | DistrustedError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return DistrustedError(cause.verify_message)
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip()
    reason = text.splitlines()[0][:300] if text else type(error).__name__
    return Broken(reason, sent=not isinstance(error, _NOT_SENT))


def _answer(response: httpx.Response) -> Answer:
    return Answer(response.status_code, response.headers, response.content)


class _OpenedHere:
    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self._response = response
        self._pieces: Iterator[bytes] = response.iter_raw(_PIECE)

    def piece(self) -> bytes:
        try:
            return next(self._pieces, b"")
        except httpx.TransportError as error:
            raise _broken(error) from error

    def close(self) -> None:
        self._response.close()


class Here:
    """Sends in the thread that asks; several threads may ask at once.

    A process that was forked off gets connections of its own.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._process = 0

    def send(self, ask: Ask) -> Answer:
        client = self._now()
        try:
            return _answer(client.send(_request(client, ask)))
        except httpx.TransportError as error:
            raise _broken(error) from error

    def open(self, ask: Ask) -> _OpenedHere:
        client = self._now()
        try:
            return _OpenedHere(client.send(_request(client, ask), stream=True))
        except httpx.TransportError as error:
            raise _broken(error) from error

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None and self._process == os.getpid():
            client.close()

    def _now(self) -> httpx.Client:
        with self._lock:
            if self._client is None or self._process != os.getpid():
                self._client = httpx.Client(**self._settings.options)
                self._process = os.getpid()
            return self._client


class _OpenedInLoop:
    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self._response = response
        self._pieces: AsyncIterator[bytes] = response.aiter_raw(_PIECE)

    async def piece(self) -> bytes:
        try:
            return await anext(self._pieces, b"")
        except httpx.TransportError as error:
            raise _broken(error) from error

    async def close(self) -> None:
        await self._response.aclose()


class InLoop:
    """Sends in an event loop, which is one and the same for all that is asked."""

    def __init__(self, settings: Settings) -> None:
        self._client = httpx.AsyncClient(**settings.options)

    async def send(self, ask: Ask) -> Answer:
        try:
            return _answer(await self._client.send(_request(self._client, ask)))
        except httpx.TransportError as error:
            raise _broken(error) from error

    async def open(self, ask: Ask) -> _OpenedInLoop:
        try:
            response = await self._client.send(_request(self._client, ask), stream=True)
        except httpx.TransportError as error:
            raise _broken(error) from error
        return _OpenedInLoop(response)

    async def close(self) -> None:
        await self._client.aclose()

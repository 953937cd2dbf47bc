"""The two clients: what is asked is the same, who waits for it is not."""

import asyncio
import os
import random
import re
import ssl
import time
from collections.abc import Coroutine
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import SecretStr

import esper
from esper.errors import InputError
from esper.recovery import CircuitBreaker, RetryPolicy
from esper.recovery._effects import Effects, with_async_sleep, with_sleep
from esper.urza.client._exchange import Exchange
from esper.urza.client._library import Operations

T = TypeVar("T")

DEFAULT_RETRY = RetryPolicy(attempts=5, base_delay=0.2, factor=2.0, max_delay=10.0, jitter=0.0)
_FAILURES = 10
_RECOVERY_SECONDS = 5.0


class LibraryClient(Operations):
    """A library behind a service, asked in the thread that calls; several may.

    It is a `KernelLibrary`, and so stands wherever an embedded one does.

    Args:
        url: the service's address, as `esper serve` tells it.
        token: by which it knows who asks; by default that of the settings, where this is the
            library that they name.
        timeout: seconds that each step of a request may take.
        retry: how often is tried what may be tried again; each wait is drawn evenly from 0 to the
            policy's delay.
        breaker: what leaves the service alone for a while when it fails; by default one that opens
            after 10 failures in a row, for 5 s.
        draws: where the waits are drawn; by default a generator of its own.
        verify: for HTTPS, a file of certificates to believe in besides the system's; True for the
            system's alone, False to believe in any, which leaves the token to whoever answers.
        connections: most at once.

    Raises:
        InputError: for an address that is none, a token that is none, or where the package of the
            extra `client` is missing.
    """

    def __init__(
        self,
        url: str,
        token: str | SecretStr | None = None,
        *,
        timeout: float = 60.0,
        retry: RetryPolicy = DEFAULT_RETRY,
        breaker: CircuitBreaker | None = None,
        draws: random.Random | None = None,
        verify: str | bool = True,
        connections: int = 32,
    ) -> None:
        self._exchange = _exchange(
            "Here", url, token, timeout, retry, breaker, draws, verify, connections
        )

    def drive_here(self, effects: Effects[T]) -> T:
        """Do what is asked, in this thread."""
        return with_sleep(effects, time.sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._exchange.url!r})"


class AsyncLibraryClient(Operations):
    """A library behind a service, asked in an event loop, always the same one.

    Args:
        As `LibraryClient`.
    """

    def __init__(
        self,
        url: str,
        token: str | SecretStr | None = None,
        *,
        timeout: float = 60.0,
        retry: RetryPolicy = DEFAULT_RETRY,
        breaker: CircuitBreaker | None = None,
        draws: random.Random | None = None,
        verify: str | bool = True,
        connections: int = 32,
    ) -> None:
        self._exchange = _exchange(
            "InLoop", url, token, timeout, retry, breaker, draws, verify, connections
        )

    def drive_in_loop(self, effects: Effects[T]) -> Coroutine[Any, Any, T]:
        """Do what is asked, in this event loop."""
        return with_async_sleep(effects, asyncio.sleep)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *what: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._exchange.url!r})"


def _exchange(
    carrier: str,
    url: str,
    token: str | SecretStr | None,
    timeout: float,
    retry: RetryPolicy,
    breaker: CircuitBreaker | None,
    draws: random.Random | None,
    verify: str | bool,
    connections: int,
) -> Exchange:
    address = _address(url)
    try:
        from esper.urza.client import _httpx
    except ImportError as error:
        raise InputError(
            f"a library at {address} needs httpx, which cannot be imported ({error}):"
            " pip install 'esper-morphogenetic[client]'"
        ) from error
    if timeout <= 0:
        raise InputError(f"the timeout of a client is more than 0 seconds, got {timeout}")
    settings = _httpx.Settings(
        address,
        {
            "User-Agent": f"esper/{esper.__version__}",
            "Accept": "application/json, application/octet-stream",
            # What comes is as it is stored, so that a part of it is a part of that.
            "Accept-Encoding": "identity",
            **_authorization(_configured(address) if token is None else token),
        },
        timeout=timeout,
        verify=_certificates(verify),
        connections=connections,
    )
    transport = getattr(_httpx, carrier)(settings)
    return Exchange(
        address,
        transport,
        retry=retry,
        breaker=breaker
        or CircuitBreaker(
            _FAILURES, _RECOVERY_SECONDS, half_open_max_calls=1, name=f"the library at {address}"
        ),
        draws=draws or random.Random(),
    )


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        ours = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        raise InputError(_EXPECTED.format("what came has no valid host or port")) from None
    if parts.username is not None or parts.password is not None:
        raise InputError(
            _EXPECTED.format("what came holds a user or a password, which is no token")
        )
    if not ours or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise InputError(_EXPECTED.format(f"got {url[:200]!r}"))
    return url.rstrip("/")


_EXPECTED = "a library's address is such as http://lab:8420; {}"


def _configured(address: str) -> SecretStr | None:
    """The token of the settings, where they mean this library: it is shown to no other."""
    from esper.settings import is_configured, load_settings

    if not is_configured(None, os.environ):
        return None
    library = load_settings().settings.library
    same = library.where is not None and library.where.rstrip("/") == address
    return library.token if same else None


def _authorization(token: str | SecretStr | None) -> dict[str, str]:
    if token is None:
        return {}
    secret = token.get_secret_value() if isinstance(token, SecretStr) else token
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", secret, re.ASCII):
        # It is not shown: what is nearly a token may be one, and a space after it.
        raise InputError(
            "the token of the library is none: expected letters, digits and -._~+/=, without"
            " spaces or line breaks, as `esper token make` tells it"
        )
    return {"Authorization": f"Bearer {secret}"}


def _certificates(verify: str | bool) -> ssl.SSLContext | bool:
    if verify is False:
        return False
    # httpx would believe in the certificates that came with it, and not in the system's.
    context = ssl.create_default_context()
    if verify is True:
        return context
    try:
        context.load_verify_locations(verify)
    except OSError as error:
        raise InputError(
            f"the certificates in {verify} cannot be read: {error}. Name a file in PEM format."
        ) from error
    return context

"""A broker by its URL."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from esper.errors import InputError
from esper.oona._broker import Broker

_SERVERS = ("redis", "rediss", "unix")


def open_broker(url: str, *, opening_seconds: float | None = None, **options: Any) -> Broker:
    """Open the bus that a URL names.

    - `memory:` is in this process, and another one each time.
    - `sqlite:PATH` is a file that processes of one machine share; `sqlite:PATH?synchronous=full`
      outlives a power cut too.
    - `redis://[USER:PASSWORD@]HOST:PORT/NUMBER`, or `rediss://…` over TLS, or
      `unix://PATH`, is on a Redis server; it takes the extra `redis`.

    Args:
        opening_seconds: for how long a server that is away is asked; 10 s by default.
        options: those of the broker: `MemoryBroker`, `SqliteBroker` or `RedisBroker`.

    Raises:
        InputError: for a URL that names no bus, or a package that is not installed.
        BusError, ServiceUnavailableError, AccessDeniedError: where the bus cannot be opened.
    """
    check_bus_url(url)
    scheme, _, rest = url.partition(":")
    if scheme == "memory":
        from esper.oona._memory import MemoryBroker

        return MemoryBroker(**options)
    if scheme == "sqlite":
        from esper.oona._sqlite import SqliteBroker

        path, _, query = rest.partition("?")
        return SqliteBroker(_path(path), **{**_synchronous(url, query), **options})
    from esper.oona._redis import RedisBroker

    return RedisBroker(url, opening_seconds=opening_seconds, **options)


def check_bus_url(url: str) -> None:
    """Refuse what `open_broker` could never open, without opening anything.

    Raises:
        InputError: for a URL that names no bus, a folder that is not there, or a package that is
            not installed.
    """
    scheme, colon, rest = url.partition(":")
    if scheme == "memory" and colon and not rest:
        return
    if scheme == "sqlite" and rest:
        path, _, query = rest.partition("?")
        _synchronous(url, query)
        place = Path(_path(path)).absolute()
        if not place.parent.is_dir():
            raise InputError(
                f"there is no folder {place.parent} for the bus {place.name}: make it first"
            )
        return
    if scheme in _SERVERS and rest.startswith("//"):
        if find_spec("redis") is None:
            raise InputError(
                "a bus on a Redis server takes the package redis:"
                " pip install 'esper-morphogenetic[redis]'"
            )
        return
    shown = f"{scheme}:" if colon else repr(url[:40])
    raise InputError(
        f"{shown} names no bus: expected memory:, sqlite:PATH or redis://HOST:PORT/NUMBER"
    )


def _path(text: str) -> str:
    # As three slashes are written before an absolute path elsewhere.
    return text.removeprefix("//") if text.startswith("///") else text


def _synchronous(url: str, query: str) -> dict[str, Any]:
    found = dict(parse_qsl(query, keep_blank_values=True))
    unknown = found.keys() - {"synchronous"}
    if unknown:
        raise InputError(
            f"{url!r} asks for {', '.join(sorted(unknown))}: a bus on a file knows synchronous=full"
            " alone"
        )
    return found

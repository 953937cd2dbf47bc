"""A Redis server: how its scripts are called, and what is done while it cannot be reached.

Each script is one step of the server, all of it or nothing, and is safe to call again after an
error whose outcome is not known; of `take`, see `RedisSeat`.
"""

import importlib.resources
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from esper.errors import (
    AccessDeniedError,
    BusError,
    InputError,
    SchemaVersionError,
    ServiceUnavailableError,
)

T = TypeVar("T")

SCHEMA_VERSION = 1
_SHORTEST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0
_WITHOUT_MEMORY = frozenset({"forget", "free", "join", "leave", "open", "settle", "take"})
"""Scripts that a server runs whose memory is full: they write little, and make room in the end."""
_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError, redis.ReadOnlyError)
"""Of a server that may be there again soon."""


class Server:
    """Calls the scripts of a bus on a server, and connects again by itself.

    Args:
        url: as redis-py takes it.
        name: under which all of the bus lies.
        timeout_seconds: how long one answer may take.
        patience_seconds: how long a call is made again and again while the server is away.

    Raises:
        InputError: for a URL that is none.
    """

    def __init__(
        self, url: str, name: str, timeout_seconds: float, patience_seconds: float
    ) -> None:
        self._name = name
        self._partitions = 0
        self._patience = patience_seconds
        self.timeout = timeout_seconds
        try:
            self.client = redis.Redis.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                # What is called again is decided here, where it is known what that does.
                retry=Retry(NoBackoff(), 0),
                decode_responses=False,
            )
            # What redis-py does not know of a URL it says where it connects, as a TypeError.
            pool = self.client.connection_pool
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError):
            # Not in its words, which may hold a part of the password.
            raise InputError(
                "this is no URL of a Redis server: expected a host, a port that is a number, and"
                " options that redis-py knows; write redis://HOST:PORT/NUMBER, and in a password"
                " %2F for /, %3F for ?, %23 for #, %40 for @ and %25 for %"
            ) from None
        self._scripts: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        """The server, without what is secret of its URL."""
        own = self.client.connection_pool.connection_kwargs
        return str(own.get("path") or f"{own.get('host')}:{own.get('port', 6379)}")

    def run(self, script: str, *arguments: Any) -> Any:
        """Call a script until it was done.

        Raises:
            ServiceUnavailableError: where the server is away for longer than there is patience.
            AccessDeniedError, BusError: where it refuses.
        """
        return self.patiently(lambda: self.run_once(script, *arguments))

    def run_once(self, script: str, *arguments: Any) -> Any:
        """Call a script.

        Raises:
            redis.RedisError: where that did not work, or it is not known whether it did.
        """
        with self._lock:
            if script not in self._scripts:
                folder = importlib.resources.files("esper.oona") / "lua"
                text = "\n".join(
                    (folder / f"{part}.lua").read_text("utf-8") for part in ("common", script)
                )
                if script in _WITHOUT_MEMORY:
                    text = f"#!lua flags=allow-oom\n{text}"
                self._scripts[script] = self.client.register_script(text)
        bus = (self._name, self._partitions, SCHEMA_VERSION)
        return self._scripts[script](args=[*bus, *arguments])

    def patiently(
        self,
        call: Callable[[], T],
        doubt: Callable[[], None] = lambda: None,
        seconds: float | None = None,
    ) -> T:
        """Call again, with pauses that differ, until the server answers; raises as `run`.

        Args:
            doubt: is called where it is not known whether a call was done.
            seconds: for how long at most, if not for as long as this server's patience.
        """
        seconds = self._patience if seconds is None else seconds
        until, pause = time.monotonic() + seconds, _SHORTEST_PAUSE
        while True:
            try:
                return call()
            except redis.AuthenticationError as error:
                raise AccessDeniedError(
                    f"the Redis server {self.where} lets nobody in with this name and password"
                    f" ({error}): write them into the URL"
                ) from error
            except _AWAY as error:
                doubt()
                if time.monotonic() + pause > until:
                    raise ServiceUnavailableError(
                        f"the Redis server {self.where} could not be reached for"
                        f" {seconds:g} s ({_first_line(error)}): see whether it runs, and"
                        " call again"
                    ) from error
            except NoPermissionError as error:
                raise AccessDeniedError(
                    f"the Redis server {self.where} does not allow this name what a bus does"
                    f" ({_first_line(error)}): it needs scripts and streams under {self._name}:*"
                ) from error
            except redis.RedisError as error:
                raise BusError(
                    f"the Redis server {self.where} refuses ({_first_line(error)}): look at its"
                    " log, its memory and its disk"
                ) from error
            # All that lost it at one moment should not come back at one moment.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def open(self, partitions: int, seconds: float | None = None) -> int:
        """Find the bus, or begin it with so many partitions; how many it has.

        Args:
            seconds: for how long a server that is away is asked, if not as long as for calls.

        Raises:
            InputError: for a server that is too old.
            SchemaVersionError: for a bus that a newer version of Esper made.
        """
        self.patiently(self._check_server, seconds=seconds)
        self._partitions = partitions
        opened = self.patiently(lambda: self.run_once("open"), seconds=seconds)
        there, version = map(int, opened)
        if version != SCHEMA_VERSION:
            raise SchemaVersionError(
                f"the bus {self._name!r} on {self.where} has schema version {version}, and this"
                f" version of Esper knows version {SCHEMA_VERSION}: it was made by a newer one."
                " Update Esper here, or begin a bus of another name."
            )
        self._partitions = there
        return there

    def _check_server(self) -> None:
        version = str(self.client.info("server")["redis_version"])
        if int(version.partition(".")[0]) < 7:
            raise InputError(
                f"the Redis server {self.where} has version {version}, and a bus needs 7 or newer"
            )

    def close(self) -> None:
        """Close all connections."""
        self.client.close()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__

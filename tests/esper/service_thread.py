"""A service in a thread of the tests, over a library that they made, with a clock of theirs."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from esper.urza import KernelLibrary
from esper.urza.client import LibraryClient
from esper.urza.service import Limits, Scope, TokenFile, make_app, token_of
from esper.urza.service._connection import connections
from esper.urza.service._memory import sqlite_changes

SECRET = "a-token-for-tests-that-nobody-guesses"


class ServedLibrary(LibraryClient):
    """A client of a service of its own, which ends with it."""

    def __init__(
        self, open_library: Callable[[], KernelLibrary], sqlite: Path | None = None, **options: Any
    ) -> None:
        limits = Limits()
        token = token_of("tests", Scope.ADMIN, secret=SECRET)[1]
        app = make_app(
            open_library,
            TokenFile(None, [token]),
            limits=limits,
            changes=None if sqlite is None else sqlite_changes(sqlite),
        )
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, http=connections(limits), ws="none", lifespan="on", log_config=None,
                access_log=False, server_header=False, timeout_graceful_shutdown=5,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        super().__init__(self.url, SECRET, **options)

    def close(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        super().close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

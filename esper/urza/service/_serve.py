"""Serving a library until somebody ends it, in one process or several."""

import dataclasses
import functools
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper._sockets import listening
from esper.errors import InputError
from esper.urza.service._certificate import check_certificate
from esper.urza.service._limits import Limits
from esper.urza.service._tokens import TokenFile

if TYPE_CHECKING:
    from fastapi import FastAPI

    from esper.urza import KernelLibrary

_BACKLOG = 2048
_SWITCH_SECONDS = 5e-4


def _nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
    """What a service is started with; it is handed to every worker process."""

    open_library: "Callable[[], KernelLibrary]"
    """Opens the library, in each process; one that can be pickled where there are several."""
    token_file: Path | None
    sqlite: Path | None = None
    """The library's database, where it is one of SQLite."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    open_metrics: bool = False
    host: str = "127.0.0.1"
    port: int = 8420
    workers: int = 1
    certificate: Path | None = None
    """For HTTPS, with its key."""
    key: Path | None = None
    prepare: Callable[[], object] = _nothing
    """Called in each process before it serves; one that can be pickled where there are several."""


def serve(options: ServiceOptions, *, tell: Callable[[str], None] = lambda text: None) -> None:
    """Serve until SIGTERM, after which this returns, or Ctrl-C.

    Both stop accepting, and let what runs end within `Limits.shutdown_seconds`.

    Args:
        options: what is served, where and to whom.
        tell: is given the address once it can be asked.

    Raises:
        InputError: where nobody has a token, certificate and key do not fit, the library cannot be
            opened, the port is taken, or the packages of the extra `serve` are missing.
        KeyboardInterrupt: after Ctrl-C, when all is closed.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn

        from esper.urza.service._connection import connections
    except ImportError as error:
        raise InputError(
            f"the service needs fastapi and uvicorn, which cannot be imported ({error}):"
            " pip install 'esper-morphogenetic[serve]'"
        ) from error
    if options.workers < 1:
        raise InputError(f"a service has at least 1 worker process, got {options.workers}")
    if not TokenFile(options.token_file).tokens():
        raise InputError(
            f"nobody has a token, so nobody could ask ({options.token_file or 'no file'} has"
            " none): make one by `esper token make NAME --scope admin"
            f" --token-file {options.token_file or 'FILE'}`"
        )
    # What is wrong is said here, and not by a process that nobody looks at.
    if options.certificate is not None and options.key is not None:
        check_certificate(options.certificate, options.key)
    options.open_library().close()
    with listening(options.host, options.port, backlog=_BACKLOG) as listener:
        config = uvicorn.Config(
            functools.partial(make_from, options),
            factory=True,
            http=connections(options.limits),
            ws="none",
            lifespan="on",
            workers=options.workers,
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(options.limits.keep_alive_seconds)),
            timeout_graceful_shutdown=max(1, round(options.limits.shutdown_seconds)),
            ssl_certfile=options.certificate,
            ssl_keyfile=options.key,
        )
        address = _shown(listener, secure=options.certificate is not None)
        if options.workers == 1:
            _serve_here(uvicorn, config, listener, lambda: tell(address))
        else:
            _serve_by_workers(config, listener, lambda: tell(address))


def make_from(options: ServiceOptions) -> "FastAPI":
    """The application of one worker process."""
    from esper.urza.service._app import make_app
    from esper.urza.service._memory import sqlite_changes

    options.prepare()
    # Threads that ask the library hold up the one that answers for no longer than that.
    sys.setswitchinterval(_SWITCH_SECONDS)
    return make_app(
        options.open_library,
        TokenFile(options.token_file),
        limits=options.limits,
        changes=None if options.sqlite is None else sqlite_changes(options.sqlite),
        open_metrics=options.open_metrics,
    )


def _serve_here(
    uvicorn: Any, config: Any, listener: socket.socket, ready: Callable[[], None]
) -> None:
    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    interrupted = threading.Event()
    # uvicorn raises the signal that it was ended by again, once all is closed.
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: None),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: interrupted.set()),
    }
    try:
        server = Server(config)
        server.run(sockets=[listener])
    except SystemExit as error:
        raise InputError("the service could not start: its log says why") from error
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    if interrupted.is_set():
        raise KeyboardInterrupt


def _serve_by_workers(config: Any, listener: socket.socket, ready: Callable[[], None]) -> None:
    from uvicorn.supervisors import Multiprocess

    # Each process counts for itself; whoever asks one of them is told the sum.
    counts = tempfile.mkdtemp(prefix="esper-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = counts
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        workers = Multiprocess(config, sockets=[listener])
        interrupted = threading.Event()
        stop = workers.handle_int

        def handle_int() -> None:
            interrupted.set()
            stop()

        workers.handle_int = handle_int
        ready()
        workers.run()
    finally:
        os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
        shutil.rmtree(counts, ignore_errors=True)
        for number, action in before.items():
            signal.signal(number, action)
    if interrupted.is_set():
        raise KeyboardInterrupt


def _shown(listener: socket.socket, *, secure: bool) -> str:
    host, port = listener.getsockname()[:2]
    return f"http{'s' * secure}://{f'[{host}]' if ':' in host else host}:{port}"

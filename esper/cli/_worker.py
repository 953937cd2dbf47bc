"""`esper worker`."""

import math
import os
import secrets
import signal
import socket
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from esper.cli._connected import BusAddress, LibraryPlace, bus_at, library_at, settings_of
from esper.cli._console import Trace, err, errors, out, say
from esper.errors import EsperError, InputError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from esper.logs import Logs
    from esper.oona import Broker
    from esper.settings import Settings
    from esper.tezzeret.service import QueueWorker, WorkerBus, WorkerStatistics
    from esper.urza import KernelLibrary

_BACKENDS = ("jax", "torch")
_OPENING = 1.0
"""Seconds for which a bus that is away is asked: it is asked again and again, beside the work."""


def worker(
    context: typer.Context,
    library: LibraryPlace = None,
    bus: BusAddress = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that compile, about 500 MB each.")
    ] = 1,
    once: Annotated[
        bool, typer.Option("--once", help="End when nothing waits to be compiled.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="By which claims are known; by default the machine's.")
    ] = None,
    lease: Annotated[
        float, typer.Option(min=1, max=3600, help="Seconds after which a lost worker's is free.")
    ] = 60.0,
    grace: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds for what is begun, when it is to end.")
    ] = 20.0,
    measure: Annotated[bool, typer.Option(help="Time each kernel here.")] = False,
    metrics: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="Serve metrics of Prometheus at this port."),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(help="The address for them; others than this one open them to others.")
    ] = "127.0.0.1",
    traceback: Trace = False,
) -> None:
    """Compile blueprints that wait in a library's queue, until told to end.

    Ctrl-C and SIGTERM end it: what is begun is finished or given back; twice ends it at once.
    """
    # Until something is claimed there is nothing to give back.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with errors(traceback, " and start it again"), ExitStack() as logs:
        from esper.tezzeret import CompilePool
        from esper.tezzeret.service import QueueWorker

        settings = settings_of(context)
        logs.enter_context(_logs(settings))
        registry = None if metrics is None else _served(metrics_host, metrics)
        broker = _bus(bus)
        store, where = _library(library, settings, wait=not once)
        known_as = name or f"{socket.gethostname()[:80]}-{os.getpid()}-{secrets.token_hex(3)}"
        pool = CompilePool(workers, measure=_BACKENDS if measure else ())
        made = QueueWorker(
            store,
            known_as,
            pool=pool,
            bus=broker,
            lease_seconds=lease,
            grace_seconds=grace,
            registry=registry,
        )
        ended = _Ended(made)
        say(out, "green", f"worker {known_as} compiles for {where} (Ctrl-C ends it)")
        try:
            done = made.run(once=once)
        finally:
            pool.close()
            if broker is not None:
                broker.close()
            store.close()
        say(out, "green", _summary(done))
        if ended.interrupted:
            raise typer.Exit(130)


def _logs(settings: "Settings | None") -> "Logs":
    """What is logged, to standard error."""
    from esper.logs import configure_logs
    from esper.settings import LoggingSettings

    asked = LoggingSettings() if settings is None else settings.logging
    return configure_logs(asked.format, asked.level, capacity=asked.capacity)


def _library(
    place: str | None, settings: "Settings | None", *, wait: bool
) -> "tuple[KernelLibrary, str]":
    """The library; one whose servers are away is waited for, as one that goes away later is."""
    from esper.tezzeret.service import Patience

    def told(_: str, error: Exception, missed: int) -> None:
        if missed == 1:
            say(err, "yellow", f"the library is away, and waited for: {error}")

    return Patience(told)("opening", lambda: library_at(place, settings), math.inf if wait else 0.0)


def _bus(url: str | None) -> "WorkerBus | None":
    """The bus; one that is away may come later."""
    from esper.tezzeret.service import LateBus

    try:
        return bus_at(url, opening_seconds=_OPENING)
    except InputError:
        raise
    except (EsperError, OSError) as error:
        say(err, "yellow", f"the worker goes on without the bus until it is there: {error}")
        return LateBus(lambda: cast("Broker", bus_at(url, opening_seconds=_OPENING)))


class _Ended:
    """Tells a worker to end at Ctrl-C and SIGTERM, and remembers which it was."""

    def __init__(self, worker: "QueueWorker") -> None:
        self.interrupted = False
        self._worker = worker
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = self.interrupted or number == signal.SIGINT
        if not self._asked:
            self._asked = True
            text = "ends when what is begun is done; once more ends it at once"
            os.write(2, f"esper: the worker {text}\n".encode())
        self._worker.stop()


def _summary(done: "WorkerStatistics") -> str:
    text = f"{done.compiled} compiled, {done.failed} failed"
    for name, count in (
        ("given back", done.given_back),
        ("tried again", done.retried),
        ("done by others", done.lost),
        ("left to their leases", done.left),
    ):
        if count:
            text += f", {count} {name}"
    if done.unannounced:
        text += f"; {done.unannounced} announcements lost, because the bus did not take them"
    return text


def _served(host: str, port: int) -> "CollectorRegistry":
    """A registry that can be read at an address."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InputError(
            f"metrics cannot be served at {host}, port {port}: {error.strerror}. Choose another"
            " port, or 0 for one that is free, or another --metrics-host"
        ) from error
    say(err, "green", f"metrics at http://{host}:{_port(server)}/metrics")
    return registry


def _port(server: Any) -> int:
    return server.server_address[1]

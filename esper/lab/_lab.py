"""A lab on one machine: which servers there are, and what comes up and goes down with them."""

import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from esper.lab._asked import Asked, asked_of, refuse_taken
from esper.lab._config import write_configs
from esper.lab._errors import LabInputError
from esper.lab._folder import LabFolder
from esper.lab._leftovers import end_leftovers, read_processes
from esper.lab._logs import put_aside
from esper.lab._postgres import postgres_server, version_of_data
from esper.lab._process import mark_of, wait_until_gone
from esper.lab._programs import find_programs
from esper.lab._redis import redis_server
from esper.lab._s3 import s3_server
from esper.lab._secrets import secrets_of
from esper.lab._server import Server
from esper.lab._supervisor import Supervisor, refuse_full
from esper.lab._tokens import write_tokens
from esper.lab._urza import service, worker

DEFAULT_FOLDER = Path("runs/lab")

_LEAST = 128 << 20
"""Bytes that a lab wants at least: PostgreSQL's first data take 40 MB, its log 16 MB a segment."""

_DOWN_SECONDS = 90.0
"""Within which a lab that was told to end has to have ended."""


def up(
    where: Path = DEFAULT_FOLDER,
    *,
    ports: Mapping[str, int] | None = None,
    workers: int | None = None,
    stores_only: bool = False,
    tell: Callable[[str], None],
) -> signal.Signals:
    """Bring a lab up and keep it up until this process is told to end.

    Args:
        where: its folder, made where there is none; else the lab goes on with what is there.
        ports: of servers, by name; those not named keep theirs, or get free ones.
        workers: how many; as many as before where nothing is said, two in a new lab.
        stores_only: PostgreSQL, Redis and S3, without Urza and workers.
        tell: is given what comes to pass, a line at a time.

    Returns:
        The signal that it was ended by.

    Raises:
        LabInputError: where the lab cannot come up as asked: a program is missing, a port is taken,
            the folder is not usable, another process has it.
        LabError: where a server cannot be started, or the disk is full.
    """
    _refuse_elsewhere()
    folder = LabFolder(where.absolute())
    version = version_of_data(folder)
    programs = find_programs(version)
    folder.make()
    with folder.held():
        for name in end_leftovers(folder):
            tell(f"{name} was left behind by a lab that was killed, and has ended")
        refuse_full(folder, _LEAST)
        used = version is not None
        secrets = secrets_of(folder.secrets, used=used)
        asked = asked_of(folder.asked, ports=ports or {}, workers=workers)
        for name, port in asked.ports.items():
            refuse_taken(name, port)
        stores = (
            postgres_server(folder, asked.ports["postgres"], secrets, programs),
            redis_server(folder, asked.ports["redis"], secrets, programs),
            s3_server(folder, asked.ports["s3"], secrets, programs),
        )
        write_configs(folder, asked, secrets)
        write_tokens(folder, secrets)
        servers = stores if stores_only else (*stores, *_esper(folder, asked))
        for server in servers:
            put_aside(folder.log(server.name))
        return Supervisor(folder, servers, tell, lambda: tell(_greeting(folder, stores_only))).run()


def down(where: Path = DEFAULT_FOLDER, *, patience: float = 20.0) -> list[str]:
    """End a lab; the names of what was ended, none where none was up.

    Args:
        where: its folder.
        patience: seconds that what a killed lab left behind is given, three times: to end by
            itself, to end when it is asked to, and to die when it is killed.

    Raises:
        LabError: where something of it does not end.
    """
    folder = LabFolder(where.absolute())
    running = read_processes(folder)
    holder = folder.holder()
    mark = mark_of(holder) if holder is not None else None
    if mark is not None:
        mark.signal(signal.SIGTERM)
        wait_until_gone([mark], _DOWN_SECONDS)
    return sorted({*running, *end_leftovers(folder, patience)})


def status(where: Path = DEFAULT_FOLDER) -> dict[str, int]:
    """The processes of a lab that run, by name."""
    folder = LabFolder(where.absolute())
    running = {name: mark.pid for name, mark in read_processes(folder).items()}
    holder = folder.holder()
    return ({"lab": holder} if holder is not None else {}) | running


def _greeting(folder: LabFolder, stores_only: bool) -> str:
    if stores_only:
        return (
            "the lab is up, without Urza and workers. They are run by hand by\n"
            f"    ESPER_CONFIG={folder.service_config} esper serve\n"
            f"    ESPER_CONFIG={folder.worker_config} esper worker\n"
            f"  Logs are in {folder.logs}; Ctrl-C or `make down` ends it"
        )
    return (
        f"the lab is up. Whoever is to use it sets\n"
        f"    export ESPER_CONFIG={folder.config}\n"
        "  or copies what that file says to an esper.yaml; `esper config show` tells what holds."
        f" Logs are in {folder.logs}; Ctrl-C or `make down` ends it"
    )


def _esper(folder: LabFolder, asked: Asked) -> tuple[Server, ...]:
    serving = service(folder, asked.ports["urza"])
    return (serving, *(worker(folder, number) for number in range(1, asked.workers + 1)))


def _refuse_elsewhere() -> None:
    if not sys.platform.startswith("linux"):
        raise LabInputError(
            "a lab of processes runs on Linux alone; elsewhere, see deploy/compose.yaml"
        )

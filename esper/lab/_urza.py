"""Urza as a service, and workers of Tezzeret that compile what it holds."""

import sys
import urllib.error
import urllib.request

from esper.lab._asked import HOST
from esper.lab._folder import LabFolder
from esper.lab._server import NotReady, Server

_ESPER = (sys.executable, "-m", "esper.cli")


def service_url(port: int) -> str:
    """Where the service is."""
    return f"http://{HOST}:{port}"


def service(folder: LabFolder, port: int) -> Server:
    """The library for everybody, over the lab's database and bucket."""
    return Server(
        name="urza",
        shown="Urza",
        command=(*_ESPER, "serve"),
        folder=folder.root,
        check=lambda: _check(port),
        needs=("postgres", "s3"),
        port=port,
        environment={"ESPER_CONFIG": str(folder.service_config)},
    )


def worker(folder: LabFolder, number: int) -> Server:
    """One that compiles; it listens nowhere."""
    return Server(
        name=f"worker-{number}",
        shown=f"worker {number}",
        command=(*_ESPER, "worker"),
        folder=folder.root,
        says="compiles for",
        needs=("urza", "redis"),
        environment={"ESPER_CONFIG": str(folder.worker_config)},
        end_seconds=60,
    )


def _check(port: int) -> None:
    try:
        with urllib.request.urlopen(f"{service_url(port)}/readyz", timeout=5) as answer:
            answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        with error:
            raise NotReady(f"{error.code}: {error.read(500).decode(errors='replace')}") from None
    except OSError as error:
        raise NotReady(str(error)) from None

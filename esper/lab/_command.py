"""`python -m esper.lab`: up, down, status.

Exit status: 0 done, 1 failed, 2 bad usage or input, 130 ended by Ctrl-C.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from esper.lab import _lab
from esper.lab._errors import LabError, LabInputError

app = typer.Typer(
    name="lab",
    help="A lab on one machine: PostgreSQL, Redis, S3, Urza and workers, as plain processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Option(help="Where the lab keeps its data, logs and secrets.")]


@app.command()
def up(
    folder: Folder = _lab.DEFAULT_FOLDER,
    port: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="The port of postgres, redis, s3 or urza; kept. May be repeated.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="How many workers; kept. Two in a new lab."),
    ] = None,
    stores: Annotated[
        bool, typer.Option("--stores", help="PostgreSQL, Redis and S3 alone.")
    ] = False,
) -> None:
    """Bring a lab up, and keep it up until Ctrl-C or `down`."""
    with _errors():
        ended_by = _lab.up(
            folder,
            ports=_ports(port or []),
            workers=workers,
            stores_only=stores,
            tell=_Teller(folder / "logs" / "lab.log"),
        )
        if ended_by is signal.SIGINT:
            raise typer.Exit(130)


@app.command()
def down(folder: Folder = _lab.DEFAULT_FOLDER) -> None:
    """End a lab, or what is left of one that was killed."""
    with _errors():
        ended = _lab.down(folder)
        print(f"ended {', '.join(ended)}" if ended else f"no lab is up in {folder}")  # noqa: T201


@app.command()
def status(folder: Folder = _lab.DEFAULT_FOLDER) -> None:
    """Say which processes of a lab run; 1 where none does."""
    with _errors():
        running = _lab.status(folder)
        for name, pid in running.items():
            print(f"{name} (process {pid})")  # noqa: T201
        if not running:
            print(f"no lab is up in {folder}")  # noqa: T201
            raise typer.Exit(1)


class _Teller:
    """Says what comes to pass on the terminal and in a log; goes on where there is neither."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __call__(self, text: str) -> None:
        text = f"{time.strftime('%H:%M:%S')} {text}\n"
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except (OSError, ValueError):  # the terminal is gone; the lab is not
            pass
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d')} {text}")
        except OSError:  # a full disk
            pass


def _ports(given: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in given:
        name, _, number = text.partition("=")
        if not number.isascii() or not number.isdecimal():
            raise LabInputError(f"--port {text}: expected NAME=NUMBER, such as redis=6400")
        found[name] = int(number)
    return found


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (LabError, OSError) as error:
        sys.stderr.write(f"esper: {error}\n")
        raise typer.Exit(2 if isinstance(error, LabInputError) else 1) from error
    except KeyboardInterrupt as error:
        sys.stderr.write("esper: interrupted\n")
        raise typer.Exit(130) from error

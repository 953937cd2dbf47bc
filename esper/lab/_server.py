"""What a server of the lab is: data for the supervisor."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from esper.lab._user import User


class NotReady(Exception):
    """A server does not answer as it should yet; the text says what it did."""


@dataclass(frozen=True)
class Server:
    """One process to be kept alive.

    Attributes:
        name: what it is called in messages, in its log's name, and by `--port`.
        shown: its name for people.
        command: the program and its arguments; no secret is among them, for all can list those.
        folder: where it runs.
        check: asks the server whether it serves, within a second or two; raises NotReady.
        says: what is in its log once it serves; for one that listens nowhere.
        needs: servers that must be ready before this one is started for the first time.
        port: where it listens, if it does.
        environment: added to what the lab itself has.
        user: whom to run as; None for who this is.
        begin: done once before the first start; may run programs by the function that it is given.
        furnish: done whenever it has become ready, before others hear of it.
        end: the signal that ends it in order.
        start_seconds: within which it has to be ready.
        end_seconds: within which it has to have ended.
    """

    name: str
    shown: str
    command: tuple[str, ...]
    folder: Path
    check: Callable[[], None] = lambda: None
    says: str | None = None
    needs: tuple[str, ...] = ()
    port: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    user: User | None = None
    begin: "Callable[[Runner], None]" = lambda run: None
    furnish: Callable[[], None] = lambda: None
    end: signal.Signals = signal.SIGTERM
    start_seconds: float = 120
    end_seconds: float = 20


Runner = Callable[[tuple[str, ...], User | None, Path], None]
"""Runs a command as a user to its end, with what it says written to a file; raises LabError where
it fails."""

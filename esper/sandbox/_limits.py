"""What a child may use, and what became of it."""

import dataclasses
import signal as signals
from typing import Literal

Limit = Literal["memory", "cpu", "wall", "file", "output"]
Status = Literal["finished", "raised", "limit", "signal", "exited"]


def signal_name(number: int) -> str:
    """`SIGSEGV`, say; `signal 40` of those that have no name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a child may use. All are set before it reads its payload.

    Raises:
        ValueError: for a limit that is not positive, or a negative `file_bytes`.
    """

    wall_seconds: float = 60.0
    """From its start, imports included. It is then killed from outside, with its group."""
    cpu_seconds: int = 60
    """Processor time after its imports, over all threads."""
    memory_bytes: int = 4 << 30
    """Address space beyond what its imports took. Enforced on Linux."""
    file_bytes: int = 0
    """Largest file that it may write, in its private folder alone; 0 forbids all writing."""
    output_bytes: int = 64 << 20
    """Largest result. What it prints is read to the end, and the last 16 KiB are kept."""
    may_fork: bool = False
    """Whether it may start processes, which are of its own program where Landlock is. It may always
    start threads."""
    cores: int = 2
    """Processors that it may run on, where the system can tell it so."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("file_bytes", "may_fork") else 1e-9
            if not value >= least:
                raise ValueError(f"the limit {field.name} must be positive, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Protections:
    """What restricted a child before it read its payload.

    Of files and of system calls it tried whether that holds; the rest the system said that it did.
    """

    in_force: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """What could not be had, each with the reason."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a child."""

    status: Status
    """`finished` with a `result`; `raised` an exception; killed by, or refused more than, a
    `limit`; died by a `signal`; or `exited` without a result."""
    result: bytes | None = None
    error: str = ""
    """What happened, in one line; empty where it finished."""
    limit: Limit | None = None
    signal: int | None = None
    output: str = ""
    """The end of what it printed, to stdout and stderr together."""
    seconds: float = 0.0
    """Wall time, imports included."""
    protections: Protections = dataclasses.field(default_factory=Protections)

    def __str__(self) -> str:
        """Which of these, in a few words."""
        if self.status == "limit":
            return f"stopped at its {self.limit} limit ({self.error})"
        if self.status == "signal" and self.signal is not None:
            return f"died by {signal_name(self.signal)}"
        return f"{self.status} ({self.error})" if self.error else self.status

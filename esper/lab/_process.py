"""Processes of the lab: how one is started, known again, and ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.lab._leash import NO_USER
from esper.lab._user import User

_LEASH = Path(__file__).with_name("_leash.py")
_FOREIGN = ("PG", "RCLONE_", "REDIS")
"""Beginnings of variables that change what the servers do. The lab says what they do."""


@dataclass(frozen=True)
class ProcessMark:
    """A process, so named that no later one of the same number is taken for it."""

    pid: int
    started: int
    """By the kernel's clock, in ticks since the machine was started."""
    boot: str

    @property
    def alive(self) -> bool:
        """Whether it runs, or has ended and was not waited for."""
        return mark_of(self.pid) == self

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to it and to all of its group, where there are any."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it alone."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def to_data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"pid": self.pid, "started": self.started, "boot": self.boot}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> "ProcessMark":
        """From what JSON has; ValueError, KeyError or TypeError where that is something else."""
        return cls(int(data["pid"]), int(data["started"]), str(data["boot"]))


def mark_of(pid: int) -> ProcessMark | None:
    """The process that has a number now; None where there is none, or only its remains."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return ProcessMark(pid, int(fields[19]), _boot())


def start_leashed(
    command: tuple[str, ...],
    *,
    folder: Path,
    log: Path,
    user: User | None = None,
    environment: Mapping[str, str] | None = None,
    orphaned: signal.Signals = signal.SIGTERM,
) -> "subprocess.Popen[bytes]":
    """Start a program in a group of its own, which is sent a signal if this process dies.

    What it writes is appended to the log. Ctrl-C on the terminal does not reach it.
    """
    uid, gid = (user.uid, user.gid) if user is not None else (NO_USER, NO_USER)
    leash = (sys.executable, "-I", "-S", str(_LEASH), os.getpid(), orphaned.value, uid, gid)
    known = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and not _is_setting(name)
    }
    with log.open("ab") as said:
        return subprocess.Popen(
            [*map(str, leash), *command],
            cwd=folder,
            env={**known, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether a child has ended, looked at before it is waited for: its number is still its own."""
    if process.returncode is not None:
        return True
    asked = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, asked) is not None


def bury(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a child that has ended, and kill what it left behind in its group."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def tell_to_end(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a child a signal; SIGKILL goes to its group. Nothing where it has ended."""
    if not has_ended(process):
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)


def wait_until_gone(marks: list[ProcessMark], seconds: float) -> list[ProcessMark]:
    """Those that are still there after so many seconds; returns as soon as none is."""
    deadline = time.monotonic() + seconds
    while alive := [mark for mark in marks if mark.alive]:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    return alive


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"ended with status {status}"


def _is_setting(name: str) -> bool:
    return name == "ESPER_CONFIG" or (name.startswith("ESPER_") and "__" in name)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

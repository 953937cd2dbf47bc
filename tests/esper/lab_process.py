"""`python -m esper.lab` as a process, in a folder that another user can pass through."""

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from esper.lab._folder import LabFolder
from esper.lab._leftovers import read_processes
from esper.lab._process import ProcessMark
from tests.esper.servers import free_port, needs

PATIENCE = 240.0


class LabProcess:
    """A lab's folder, and the process that keeps it up, if one does.

    Args:
        place: the folder that the lab's own is in; one of its own by default, removed at the end.
    """

    def __init__(self, place: Path | None = None) -> None:
        self._is_ours = place is None
        # pytest's own folders can be entered by their owner alone.
        self.place = Path(tempfile.mkdtemp(prefix="esper-lab-")) if place is None else place
        self.place.chmod(0o711)
        self.folder = LabFolder(self.place / "lab")
        self.ports = {name: free_port() for name in ("postgres", "redis", "s3", "urza")}
        self.said = ""
        self._lines: queue.Queue[str] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self.call("down")
        if self._process is not None:
            self._process.wait(PATIENCE)
            self._reader.join(PATIENCE)
        if self._is_ours:
            shutil.rmtree(self.place)

    @property
    def process(self) -> "subprocess.Popen[str]":
        """The one that was started last."""
        assert self._process is not None
        return self._process

    def command(self, verb: str, *more: str) -> list[str]:
        """What runs a verb."""
        return [sys.executable, "-m", "esper.lab", verb, "--folder", str(self.folder.root), *more]

    def call(self, verb: str, *more: str) -> "subprocess.CompletedProcess[str]":
        """Run a verb to its end."""
        return subprocess.run(
            self.command(verb, *more), capture_output=True, text=True, check=False, timeout=PATIENCE
        )

    def start(self, *more: str, ports: bool = True) -> None:
        """Begin to bring it up."""
        given = [f"--port={name}={port}" for name, port in self.ports.items()] if ports else []
        self.said = ""
        self._lines = queue.Queue()
        self._process = subprocess.Popen(
            self.command("up", *given, *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(
            target=self._read, args=(self._process, self._lines), daemon=True
        )
        self._reader.start()

    @staticmethod
    def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str]") -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put("")

    def hear(self, pattern: str) -> str:
        """Wait until a line is said that matches; that line."""
        until = time.monotonic() + PATIENCE
        while True:
            line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            self.said += line
            assert line, f"{pattern!r} was never said, but:\n{self.said}"
            if re.search(pattern, line):
                return line

    def up(self, *more: str, ports: bool = True) -> None:
        """Bring it up, and wait until it is."""
        self.start(*more, ports=ports)
        self.hear("the lab is up")
        self.hear("ends it$")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to end; its exit status once it has, and all that it said is heard."""
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        while line := self._lines.get(timeout=PATIENCE):
            self.said += line
        return status

    def marks(self) -> dict[str, ProcessMark]:
        """Its servers."""
        return read_processes(self.folder)

    def config(self, name: str = "service.yaml") -> Any:
        """What it has written for its service or its users."""
        return yaml.safe_load((self.folder.root / name).read_text())


def needs_servers() -> None:
    """Skip where PostgreSQL or Redis is not installed; fail where CI wants all."""
    needs("initdb", "postgres", among=sorted(Path("/usr/lib/postgresql").glob("*/bin")))
    needs("redis-server")


def is_root() -> bool:
    """Whether the tests are run by root."""
    return os.geteuid() == 0

"""A real server as a process on a port of its own: started, killed, started again."""

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

_PATIENCE_SECONDS = 60.0
"""How long a server may take to start or to end; the machine may have much else to do."""


def needs(*programs: str, among: Sequence[Path] = ()) -> list[str]:
    """The paths of programs; skips where one is not installed, and fails where CI asks for all.

    Args:
        among: folders that are looked through beside PATH.
    """
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, among)])
    found: list[str] = []
    for program in programs:
        path = shutil.which(program, path=places)
        if path is None:
            why = f"{program} is not installed"
            if os.environ.get("CI") == "true":
                pytest.fail(f"{why}, and this run is to leave nothing out")
            pytest.skip(why)
        found.append(path)
    return found


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    """Whether something takes connections there."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """A server process; the same port and the same files each time that it is started.

    Args:
        name: for messages.
        command: what starts it.
        url: where it is found.
        ready: whether it answers.
        log: where it writes what it says.
        user: who runs it, where that is not who runs the tests; as ids of user and group.
        environment: beside that of the tests.
        ending: the signal that asks it to end.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        url: str,
        *,
        ready: Callable[[], bool],
        log: Path,
        user: tuple[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
        ending: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.url = url
        self._command = list(command)
        self._ready = ready
        self._log = log
        self._user = user
        self._environment = {**os.environ, **(environment or {})}
        self._ending = ending
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        atexit.register(self.kill)

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, and return once it answers."""
        assert not self.running, f"{self.name} runs already"
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment,
                    start_new_session=True,
                    user=None if self._user is None else self._user[0],
                    group=None if self._user is None else self._user[1],
                    extra_groups=None if self._user is None else [],
                )
            self._watch_over(self._process.pid)
            while self._process.poll() is None:
                if self._ready():
                    return
                if time.monotonic() > until:
                    self.kill()
                    raise RuntimeError(f"{self.name} does not answer: {self._said()}")
                time.sleep(0.02)
            # What was killed may hold the port or a lock for a moment more.
            if time.monotonic() > until:
                raise RuntimeError(f"{self.name} does not start: {self._said()}")
            time.sleep(0.2)

    def _watch_over(self, pid: int) -> None:
        """Have it end with the tests also where these are killed: a pipe of theirs closes then."""
        self._watch_no_more()
        self._watch = subprocess.Popen(
            ["sh", "-c", f"read -r _; kill -9 {pid}"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _watch_no_more(self) -> None:
        if self._watch is not None:
            self._watch.kill()
            self._watch.communicate()
            self._watch = None

    def kill(self) -> None:
        """SIGKILL to it and to all that it started; nothing of it is left when this returns."""
        self._watch_no_more()
        if self._process is None:
            return
        for pid in [*_descendants(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(_PATIENCE_SECONDS)
        self._process = None

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        if self._process is None:
            return
        self._watch_no_more()
        self._process.send_signal(self._ending)
        try:
            self._process.wait(_PATIENCE_SECONDS)
            self._process = None
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def restart(self) -> None:
        """Start it again, with what it had; it is stopped first where it runs."""
        self.stop()
        self.start()

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def _descendants(pid: int) -> list[int]:
    """All that a process started, and what those started; some servers leave their group."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(word) for word in text.split()]
    return [each for child in children for each in (*_descendants(child), child)]

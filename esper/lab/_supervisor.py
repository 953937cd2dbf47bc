"""Servers kept alive by one process: started in order, started again, ended in order."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from esper.lab._errors import LabError
from esper.lab._folder import LabFolder
from esper.lab._leftovers import write_processes
from esper.lab._logs import holds, last_lines, length_of
from esper.lab._process import (
    ProcessMark,
    bury,
    has_ended,
    how_it_ended,
    mark_of,
    start_leashed,
    tell_to_end,
)
from esper.lab._server import NotReady, Server
from esper.lab._signals import Signals
from esper.lab._user import User
from esper.lab._watched import GOOD_AFTER, Phase, Watched

_LOOK = 0.1
"""Seconds between two questions to a server that starts."""


class _Asked(Exception):
    """This process was told to end."""


class Supervisor:
    """Keeps servers alive until it is told to end.

    Args:
        folder: the lab's; logs are written there, and which processes there are.
        servers: each after those that it needs.
        tell: is given a line whenever something has come to pass; must not raise.
        ready: called once, when all of them answer for the first time.
    """

    def __init__(
        self,
        folder: LabFolder,
        servers: Sequence[Server],
        tell: Callable[[str], None],
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._watched = {server.name: Watched(server) for server in servers}
        self._tell = tell
        self._ready = ready
        self._told_ready = False
        self._signals = Signals()

    def run(self) -> signal.Signals:
        """Until a signal to end comes, and all servers have ended; that signal.

        Raises:
            LabError: where a server cannot be started at all; the others have ended then.
        """
        with self._signals.listening():
            try:
                while self._signals.asked is None:
                    self._look()
                    self._signals.wait(self._pause())
            except _Asked:
                pass
            finally:
                self._end_all()
            assert self._signals.asked is not None
            return self._signals.asked

    def _look(self) -> None:
        for watched in self._watched.values():
            match watched.phase:
                case Phase.WAITING:
                    self._start(watched)
                case Phase.STARTING:
                    self._try(watched)
                case Phase.READY:
                    self._mind(watched)
        if not self._told_ready and all(w.phase is Phase.READY for w in self._watched.values()):
            self._told_ready = True
            self._ready()

    def _pause(self) -> float | None:
        """Until the next look is worth it."""
        waits = [
            watched.due - time.monotonic()
            for watched in self._watched.values()
            if watched.phase is Phase.WAITING and self._may_start(watched)
        ]
        if any(watched.phase is Phase.STARTING for watched in self._watched.values()):
            waits.append(_LOOK)
        return max(0.0, min(waits)) if waits else None

    def _may_start(self, watched: Watched) -> bool:
        return all(self._watched[name].phase is Phase.READY for name in watched.server.needs)

    def _start(self, watched: Watched) -> None:
        if time.monotonic() < watched.due or not self._may_start(watched):
            return
        server = watched.server
        try:
            if not watched.begun:
                server.begin(self._run)
                watched.begun = True
            watched.log_from = length_of(self._folder.log(server.name))
            watched.process = start_leashed(
                server.command,
                folder=server.folder,
                log=self._folder.log(server.name),
                user=server.user,
                environment=server.environment,
                orphaned=server.end,
            )
            watched.phase = Phase.STARTING
            watched.due = time.monotonic() + server.start_seconds
            self._write_down()
        except (OSError, LabError) as error:
            if watched.process is not None:
                self._kill(watched.process)
            self._failed(watched, f"cannot be started: {error}", shown=False)

    def _try(self, watched: Watched) -> None:
        process, server = watched.process, watched.server
        assert process is not None
        if has_ended(process):
            self._failed(watched, f"{how_it_ended(bury(process))} before it was ready")
            return
        try:
            log = self._folder.log(server.name)
            if server.says is not None and not holds(log, server.says, watched.log_from):
                raise NotReady(f"it has not said {server.says!r}")
            server.check()
            server.furnish()
        except NotReady as error:
            watched.why = str(error)
        except LabError:
            raise
        except Exception as error:  # whatever its client makes of a server that dies meanwhile
            watched.why = f"{type(error).__name__}: {error}"
        else:
            watched.phase = Phase.READY
            watched.since = time.monotonic()
            again = " again" if watched.ever else ""
            watched.ever = True
            at = f" at port {server.port}" if server.port is not None else ""
            self._tell(f"{server.shown} is up{again}{at} (process {process.pid})")
            return
        if time.monotonic() > watched.due:
            self._kill(process)
            self._failed(
                watched, f"was not ready within {server.start_seconds:.0f} s ({watched.why})"
            )

    def _mind(self, watched: Watched) -> None:
        process = watched.process
        assert process is not None
        if has_ended(process):
            if time.monotonic() - watched.since > GOOD_AFTER:
                watched.failures = 0
            self._failed(watched, how_it_ended(bury(process)))

    def _failed(self, watched: Watched, what: str, *, shown: bool = True) -> None:
        server = watched.server
        log = self._folder.log(server.name)
        said = "".join(f"\n    {line}" for line in last_lines(log)) if shown else ""
        watched.process = None
        watched.phase = Phase.WAITING
        pause = watched.pause()
        if watched.given_up:
            raise LabError(
                f"{server.shown} {what}, {watched.failures} times; its log {log} ends:{said}"
                if said
                else f"{server.shown} {what}, {watched.failures} times; its log is {log}"
            )
        watched.due = time.monotonic() + pause
        self._tell(f"{server.shown} {what}; it is started again in {pause:.0f} s{said}")

    def _run(self, command: tuple[str, ...], user: User | None, log: Path) -> None:
        """Run a program to its end, unless this process is told to end."""
        # initdb and the like are killed with the lab: what they make is of no use half made.
        process = start_leashed(
            command, folder=self._folder.root, log=log, user=user, orphaned=signal.SIGKILL
        )
        try:
            while not has_ended(process):
                if self._signals.asked is not None:
                    raise _Asked
                self._signals.wait(_LOOK)
        finally:
            if not has_ended(process):
                self._kill(process)
        status = bury(process)
        if status:
            said = "".join(f"\n    {line}" for line in last_lines(log))
            raise LabError(f"{Path(command[0]).name} {how_it_ended(status)}; {log} ends:{said}")

    def _end_all(self) -> None:
        """End servers, those that need others before those."""
        while level := self._last_level():
            for watched in level:
                assert watched.process is not None
                tell_to_end(watched.process, watched.server.end)
            deadline = time.monotonic() + max(w.server.end_seconds for w in level)
            while not all(w.process is None or has_ended(w.process) for w in level):
                if self._signals.impatient or time.monotonic() > deadline:
                    break
                self._signals.wait(_LOOK)
            for watched in level:
                self._end(watched)
        try:
            self._folder.processes.unlink(missing_ok=True)
        except OSError as error:
            self._tell(f"{self._folder.processes} stays: {error.strerror}")
        self._tell("all servers have ended")

    def _last_level(self) -> list[Watched]:
        """Those that run, and that no other one needs that runs."""
        running = [watched for watched in self._watched.values() if watched.process is not None]
        needed = {name for watched in running for name in watched.server.needs}
        return [watched for watched in running if watched.server.name not in needed]

    def _end(self, watched: Watched) -> None:
        process, server = watched.process, watched.server
        assert process is not None
        if has_ended(process):
            status = bury(process)
            # Some end by the signal, some as a shell says it.
            if status not in (0, -server.end, 128 + server.end):
                self._tell(f"{server.shown} {how_it_ended(status)}")
        else:
            self._kill(process)
            self._tell(f"{server.shown} did not end by itself and was killed")
        watched.process = None

    def _kill(self, process: "subprocess.Popen[bytes]") -> None:
        tell_to_end(process, signal.SIGKILL)
        while not has_ended(process):
            time.sleep(0.01)
        bury(process)

    def _write_down(self) -> None:
        marks: dict[str, ProcessMark] = {}
        for name, watched in self._watched.items():
            mark = mark_of(watched.process.pid) if watched.process is not None else None
            if mark is not None:
                marks[name] = mark
        write_processes(self._folder, marks)


def refuse_full(folder: LabFolder, least: int) -> None:
    """Raise LabError where the lab's disk has less room than so many bytes."""
    free = shutil.disk_usage(folder.root).free
    if free < least:
        raise LabError(
            f"the disk of {folder.root} has {free >> 20} MiB left and the lab wants"
            f" {least >> 20} MiB at least: make room there, or name a folder elsewhere by --folder"
        )

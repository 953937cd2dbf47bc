"""A server that is watched over: its phases, and when it is tried again."""

import subprocess
from dataclasses import dataclass
from enum import StrEnum

from esper.lab._server import Server

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
"""Seconds before a server that ended is started again: doubled each time, up to this."""

GOOD_AFTER = 60.0
"""Seconds that a server has to be ready for until its earlier ends are forgotten."""

FIRST_TRIES = 3
"""Starts after which a server that never became ready is given up, and the lab with it."""


class Phase(StrEnum):
    """What a server is at."""

    WAITING = "waiting"  # for its time, or for another server
    STARTING = "starting"  # runs, and does not answer yet
    READY = "ready"  # answers


@dataclass
class Watched:
    """One server of the lab, and what became of it so far."""

    server: Server
    phase: Phase = Phase.WAITING
    process: "subprocess.Popen[bytes] | None" = None
    due: float = 0.0
    """When it is to be started, or by when it has to be ready."""
    log_from: int = 0
    """Where its log began when it was started last."""
    since: float = 0.0
    """When it became ready."""
    failures: int = 0
    """Ends since it was last well for a while."""
    ever: bool = False
    """Whether it has been ready at all."""
    begun: bool = False
    """Whether what comes before its first start is done."""
    why: str = ""
    """What its last check said."""

    def pause(self) -> float:
        """Seconds until the next start, with one failure more."""
        self.failures += 1
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self.failures - 1))

    @property
    def given_up(self) -> bool:
        """Whether there is no hope that it ever starts."""
        return not self.ever and self.failures >= FIRST_TRIES

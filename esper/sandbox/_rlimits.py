"""Limits of a process that the system keeps, and privileges that it gives up."""

import ctypes
import os
import random
import resource
import signal
import sys
from pathlib import Path

from esper.sandbox._limits import Limits

_PR_SET_PDEATHSIG = 1
_CAPSET, _CAPABILITIES_V3 = {"x86_64": 126, "aarch64": 91, "riscv64": 91}, 0x20080522
_CAP_DAC_READ_SEARCH = 1 << 2
"""Kept: a library that only its owner may read is still to be imported. It allows no writing."""


def die_with(parent: int) -> None:
    """Be killed when the parent is. Where it is gone already, exit."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def run_on(cores: int) -> None:
    """Run on so many processors at most, so that libraries start no more threads than that."""
    if sys.platform == "linux":
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, random.sample(mine, min(cores, len(mine))))


def restrict(limits: Limits) -> tuple[str, ...]:
    """Set the limits that hold from here on; what is used already does not count.

    Returns:
        Which are in force.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(usage.ru_utime + usage.ru_stime)
    # A process may catch or ignore the signal of the first; the second kills.
    seconds = spent + max(1, round(limits.cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kept = ["processor time", "file size"]
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        kept.append("memory")
    return tuple(kept)


def drop_capabilities() -> None:
    """Give up what root may do beyond others, but for reading files.

    Raises:
        OSError: where the system refuses, or it is not known how.
    """
    number = _CAPSET.get(os.uname().machine)
    if sys.platform != "linux" or number is None:
        raise OSError(f"not known on {sys.platform}, {os.uname().machine}")
    held = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("CapPrm")]  # fmt: skip
    keep = int(held[0], 16) & _CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    data = (ctypes.c_uint32 * 6)(keep, keep, 0, 0, 0, 0)
    if ctypes.CDLL(None, use_errno=True).syscall(number, header, data):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))

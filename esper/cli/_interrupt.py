"""Ctrl-C while a command is not ready to answer it.

jax, torch and what comes with them run machine code while they are imported, which does not bear
an exception in its middle: the process crashes, or goes on as if nothing were.
"""

import os
import signal
from types import FrameType


def end_at_once() -> None:
    """From here on Ctrl-C ends the process where it is, unless it means something else already."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, if `end_at_once` changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"esper: interrupted\n")
    os._exit(130)

"""What a fork takes into the new process, where no other thread goes on.

Values that a lock guards must be whole there, and the lock free; and nobody may wait there
for what a thread of the parent had begun.
"""

import os
import threading
import weakref
from typing import Protocol


class Renewed(Protocol):
    """What begins anew in a process that was forked."""

    def forked(self) -> None:
        """Forget what is under way in the parent, and who holds which lock there."""
        ...


_forking = threading.Lock()
_locks: "weakref.WeakSet[threading.Lock]" = weakref.WeakSet()
_renewed: "weakref.WeakSet[Renewed]" = weakref.WeakSet()
_held: list[threading.Lock] = []


def hold_at_fork(lock: threading.Lock) -> None:
    """Fork when nobody holds a lock, so that what it guards is whole in both processes.

    Who holds it forks nothing, and waits for no other such lock.
    """
    with _forking:
        _locks.add(lock)


def renew_at_fork(value: Renewed) -> None:
    """Have a value begin anew in processes that are forked from this one."""
    with _forking:
        _renewed.add(value)


def _before() -> None:
    _forking.acquire()
    _held.extend(_locks)
    for lock in _held:
        lock.acquire()


def _after() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


def _in_child() -> None:
    for value in list(_renewed):
        value.forked()
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)

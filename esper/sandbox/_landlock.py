"""Landlock: a process gives up files, TCP and signals to others, for itself and its threads.

See landlock(7). There is no settled package for it on the index, and three system calls, whose
numbers are the same on every architecture, are all of it.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1
_NO_NEW_PRIVS = 38

_WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
READ = READ_FILE | READ_DIR
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_TRUNCATE = 1 << 14
WRITE = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _TRUNCATE
DEVICE = READ_FILE | _WRITE_FILE
_OF_FILES = _WRITE_FILE | READ_FILE | _TRUNCATE
"""Rights that a rule on what is no folder may name."""

_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many rights over files a version knows, each one bit, from the lowest."""
_ALL_TCP = 0b11
_ALL_SCOPES = 0b11
"""Abstract Unix sockets, and signals to processes outside."""


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(number: int, *args: object) -> int:
    if _LIBC is None:
        raise OSError("Landlock is a part of Linux")
    result = _LIBC.syscall(number, *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def version() -> int:
    """The version of Landlock that the kernel offers; 0 where it has none."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    except OSError:
        return 0


def set_no_new_privs() -> None:
    """Give up what set-user-id programs would grant; the kernel wants it of who restricts itself.

    Raises:
        OSError: where it is refused.
    """
    if _LIBC is None or _LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("no_new_privs cannot be set")


def restrict(allowed: Mapping[int, Iterable[Path]]) -> tuple[str, ...]:
    """Give up all files but these, TCP and signals to others, as far as the kernel can tell.

    Nothing may be executed. It binds this thread and those it starts later, so it is to be called
    before there is any other. What is open stays open.

    Args:
        allowed: paths by what may be done beneath them; those that do not exist are passed over.

    Returns:
        What is restricted now.

    Raises:
        OSError: where the kernel has no Landlock or refuses; or there is another thread.
    """
    abi = version()
    if not abi:
        raise OSError("the kernel offers no Landlock")
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise OSError("there are other threads already, which Landlock would not bind")
    handled = (1 << _FILE_RIGHTS[min(abi, max(_FILE_RIGHTS))]) - 1
    rules = _Ruleset(handled, _ALL_TCP if abi >= 4 else 0, _ALL_SCOPES if abi >= 6 else 0)
    # A kernel refuses a structure that is longer than its own unless the rest is zero.
    ruleset = _call(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(ctypes.sizeof(rules)), 0)
    try:
        for rights, paths in allowed.items():
            for path in paths:
                _allow(ruleset, path, rights & handled)
        set_no_new_privs()
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return ("files", *(["tcp"] if abi >= 4 else []), *(["signals"] if abi >= 6 else []))


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        own = rights if path.is_dir() else rights & _OF_FILES
        rule = _PathBeneath(own, place)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(place)

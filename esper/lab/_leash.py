"""A server that ends when whoever started it has died, however that died.

This file is run as a program of its own, before the server's program takes its place:
`python -I -S _leash.py PARENT SIGNAL UID GID PROGRAM ARGUMENT…`. It imports the standard library
alone. The user is changed here, and not by whoever starts it, for that user may not be allowed to
read this file or this Python; and before the leash is put on, for Linux takes it off with a change
of user.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1

NO_USER = -1
"""In the place of a user's number: go on as whoever this is."""


def main() -> None:
    """Put the leash on, and become the program."""
    parent, number, uid, gid = map(int, sys.argv[1:5])
    program = sys.argv[5:]
    if uid != NO_USER:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the leash was on
        sys.exit(1)
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"{program[0]}: {error.strerror}")


if __name__ == "__main__":
    main()

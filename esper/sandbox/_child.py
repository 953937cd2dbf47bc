"""What runs in the child: restrict, then read the payload, then call the function.

It is started as a script by `run`, isolated from the user's environment. On its standard input
comes a line of JSON (the function, limits and paths) and then the payload. On the descriptor that
is its argument it answers in frames: a letter, a length, and so many bytes.
"""

import contextlib
import errno
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

_MEMORY_SIGNS = ("bad_alloc", "out of memory", "can't allocate memory", "cannot allocate memory")


def _frame(answers: int, letter: bytes, body: bytes) -> None:
    left = memoryview(letter + len(body).to_bytes(8, "big") + body)
    while left:
        left = left[os.write(answers, left) :]


def _read(size: int) -> bytes:
    """So many bytes and no more: the payload, which comes next, is not touched yet."""
    got = b""
    while len(got) < size:
        more = os.read(0, size - len(got))
        if not more:
            os._exit(1)
        got += more
    return got


def _restrict_files(asked: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Before anything is imported, and so before there are threads."""
    from esper.sandbox import _landlock

    folder = Path(asked["folder"])
    own = _landlock.WRITE if asked["limits"]["file_bytes"] else _landlock.READ
    allowed = {
        _landlock.READ: [Path(p) for p in asked["readable"]],
        _landlock.READ_DIR: [Path(p) for p in asked["listed"]],
        _landlock.DEVICE: [Path("/dev/null")],
    }
    # Two rules for one path would add up, and so do these keys where they are equal.
    allowed[own] = [*allowed.get(own, []), folder]
    try:
        kept = _landlock.restrict(allowed)
    except OSError as error:
        return [], [f"landlock: {error}"]
    outside = Path(asked["outside"])
    for attempt in (outside.read_bytes, lambda: (outside.parent / "made").touch()):
        try:
            attempt()
        except PermissionError:
            continue
        return [], ["landlock: it was set, and a file outside was opened all the same"]
    return [f"landlock: {name}" for name in kept], []


def _restrict_calls(seccomp: Any, may_fork: bool) -> tuple[list[str], list[str]]:
    import socket

    from esper.sandbox import _seccomp

    if isinstance(seccomp, str):
        return [], [seccomp]
    try:
        _seccomp.restrict(seccomp, may_fork=may_fork)
    except (OSError, ValueError, NotImplementedError) as error:
        return [], [f"seccomp: {error}"]
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    except PermissionError:
        return ["seccomp"], []
    except OSError as error:
        return [], [f"seccomp: it was set, and a socket failed for another reason ({error})"]
    return [], ["seccomp: it was set, and a socket was opened all the same"]


def _load_seccomp() -> Any:
    """Its library, or why there is none."""
    from esper.sandbox import _seccomp

    try:
        return _seccomp.library()
    except OSError as error:
        return f"seccomp: {error}"


def _limit_of(error: BaseException) -> str | None:
    """The limit that an exception speaks of."""
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "file"
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in _MEMORY_SIGNS):
        return "memory"
    return None


def _failure(error: BaseException) -> bytes:
    text = f"{type(error).__name__}: {error}"[:4000]
    return json.dumps({"error": text, "limit": _limit_of(error)}).encode()


def main(answers: int) -> None:
    """Serve one call; never returns."""
    asked = json.loads(_read(int.from_bytes(_read(8), "big")))
    sys.path[:] = asked["path"]
    from esper.sandbox import _rlimits
    from esper.sandbox._limits import Limits

    limits = Limits(**asked["limits"])
    _rlimits.die_with(asked["parent"])
    os.chdir(asked["folder"])
    with contextlib.suppress(OSError):
        _rlimits.run_on(limits.cores)
    seccomp = _load_seccomp()
    try:
        kept, missing = _restrict_files(asked)
        module, _, name = asked["function"].partition(":")
        # torch imports it where it is installed, and it makes a temporary file when it is.
        sys.modules.setdefault("dill", None)  # pyright: ignore[reportArgumentType]
        function = getattr(importlib.import_module(module), name)
        try:
            _rlimits.drop_capabilities()
            kept.append("capabilities")
        except OSError as error:
            missing.append(f"capabilities: {error}")
        for more, lacking in (
            (_rlimits.restrict(limits), ()),
            _restrict_calls(seccomp, limits.may_fork),
        ):
            kept.extend(more)
            missing.extend(lacking)
        _frame(answers, b"P", json.dumps({"in_force": kept, "missing": missing}).encode())
        with open(0, "rb", closefd=False) as source:
            payload = source.read()
        result = function(payload)
        if not isinstance(result, bytes):
            raise TypeError(f"{asked['function']} returned {type(result).__name__}, not bytes")
        _frame(answers, b"R", result)
    except BaseException as error:  # whatever it is, the parent is to hear of it
        _frame(answers, b"E", _failure(error))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end, where libraries that were refused something may hang.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""What tests run in a sandbox: functions that try to get out of it, and some that do not.

They are called without any check of what they do, so that what holds them is the sandbox alone.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def attempt(action: Any) -> str:
    """What came of it: `done`, or the name of the error's number."""
    import errno

    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "done"


def echo(payload: bytes) -> bytes:
    return payload[::-1]


def raises(payload: bytes) -> bytes:
    sys.stdout.write("about to raise\n")
    raise KeyError(payload.decode())


def returns_text(_: bytes) -> Any:
    return "text"


def allocates(_: bytes) -> bytes:
    held = []
    while True:
        held.append(b"x" * (64 << 20))


def allocates_in_torch(_: bytes) -> bytes:
    import torch

    held = []
    while True:
        held.append(torch.ones(16 << 20))


def computes_for_ever(_: bytes) -> bytes:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass


def sleeps_for_ever(_: bytes) -> bytes:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # In native code, where no Python handler would run.
    while True:
        ctypes.CDLL(None).sleep(1000)


def tells_its_number_and_sleeps(_: bytes) -> bytes:
    Path("partial").write_text(str(os.getpid()))
    Path("partial").rename("number")
    return sleeps_for_ever(b"")


def closes_its_pipes_and_stays(_: bytes) -> bytes:
    os.closerange(0, 64)
    while True:
        time.sleep(1)


def answers_without_end(_: bytes) -> bytes:
    return b"x" * (8 << 20)


def prints_without_end(_: bytes) -> bytes:
    for turn in range(2000):
        sys.stdout.write(f"{turn} {'x' * 1000}\n")
    return b"printed"


def segfaults(_: bytes) -> bytes:
    ctypes.string_at(0)
    return b""


def exits(_: bytes) -> bytes:
    os._exit(7)


def dies_by_a_signal_without_a_name(_: bytes) -> bytes:
    signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN + 6)
    return b""


def kills_itself(_: bytes) -> bytes:
    os.abort()


def forges_an_answer(_: bytes) -> bytes:
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"P" + (2).to_bytes(8, "big") + b"{}")
            os.write(descriptor, b"E" + (4).to_bytes(8, "big") + b"\xff{[1")
    return b"after all"


def reaches_out(payload: bytes) -> bytes:
    """Try all of it, and tell what came of each."""
    asked = json.loads(payload)
    outside, parent, port = Path(asked["outside"]), asked["parent"], asked["port"]
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: Any) -> Any:
        def made() -> None:
            if getattr(libc, name)(*args) < 0:
                raise OSError(ctypes.get_errno(), name)

        return made

    def tcp() -> None:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()

    def udp() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", ("127.0.0.1", port))

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    found = {
        "writes outside": attempt(lambda: (outside / "written").write_text("x")),
        "reads outside": attempt((outside / "secret").read_bytes),
        "lists outside": attempt(lambda: list(outside.iterdir())),
        "removes outside": attempt((outside / "secret").unlink),
        "changes a mode outside": attempt(lambda: (outside / "secret").chmod(0o777)),
        "reads passwords": attempt(Path("/etc/passwd").read_bytes),
        "reads its parent's variables": attempt(Path(f"/proc/{parent}/environ").read_bytes),
        "writes in its folder": attempt(lambda: Path("own").write_text("own")),
        "connects": attempt(tcp),
        "sends a datagram": attempt(udp),
        "opens a unix socket": attempt(lambda: socket.socket(socket.AF_UNIX).close()),
        "forks": attempt(fork),
        "runs a program": attempt(lambda: subprocess.run(["/bin/true"], check=True)),
        "execs": attempt(lambda: os.execv("/bin/true", ["true"])),
        "execs itself": attempt(lambda: os.execv(sys.executable, ["python", "-c", ""])),
        "signals its parent": attempt(lambda: os.kill(parent, 0)),
        "traces its parent": attempt(call("ptrace", 16, parent, 0, 0)),
        "unshares": attempt(call("unshare", 0x10000000)),
        "mounts": attempt(call("mount", b"none", b"/tmp", b"tmpfs", 0, None)),
        "raises its limits": attempt(lambda: _set_memory(resource.RLIM_INFINITY)),
        "moves to other processors": attempt(lambda: os.sched_setaffinity(0, {0})),
        "leaves its parent": attempt(call("prctl", 1, 0, 0, 0, 0)),
        "starts a thread": attempt(_thread),
    }
    return json.dumps(found).encode()


def _set_memory(most: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except ValueError as error:
        # What Python makes of EPERM here.
        raise PermissionError(1, str(error)) from error


def _thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def variables(_: bytes) -> bytes:
    return json.dumps(dict(os.environ)).encode()


def writes(payload: bytes) -> bytes:
    Path("file").write_bytes(b"x" * int(payload))
    return b"written"


def forks_and_leaves(_: bytes) -> bytes:
    pid = os.fork()
    if pid == 0:
        time.sleep(1000)
        os._exit(0)
    return str(pid).encode()


def uses_both(_: bytes) -> bytes:
    import jax
    import jax.numpy as jnp
    import torch

    grown = jax.jit(lambda x: jnp.tanh(x) @ x.T)(jnp.ones((4, 4)))
    return f"{float(grown.sum()):.3f} {float(torch.ones(4).sum())}".encode()


def compiles(_: bytes) -> bytes:
    from esper.contracts import KernelSignature
    from esper.tezzeret import compile_blueprint, load_blueprint

    signature = KernelSignature(input_shape=(4,), output_shape=(4,))
    return compile_blueprint(load_blueprint("low_rank"), signature).data


def scans_flipped(program: bytes) -> bytes:
    """Scan a program with a bit flipped, 300 times; in here because native code parses it."""
    import random

    from esper.artifacts import scan_stablehlo
    from esper.errors import ArtifactError

    chooser = random.Random(22)
    counts = {"refused": 0, "accepted": 0}
    for _ in range(300):
        place = chooser.randrange(8 * len(program))
        damaged = bytearray(program)
        damaged[place // 8] ^= 1 << place % 8
        try:
            scan_stablehlo(bytes(damaged))
            counts["accepted"] += 1
        except ArtifactError:
            counts["refused"] += 1
    return json.dumps(counts).encode()

"""Start a child, feed it, listen to it within bounds, and make sure that it is gone."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from esper.sandbox._limits import Limit, Limits, Outcome, Protections, Status

_CHILD = Path(__file__).with_name("_child.py")
_TAIL = 16 << 10
_CHUNK = 1 << 16
_HEADER = 9

_READABLE = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/os-release",
    "/etc/alternatives", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
    "/proc/filesystems", "/proc/version", "/proc/sys/vm", "/sys/devices/system",
    "/sys/fs/cgroup", "/sys/kernel/mm", "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip
"""What the C library, Python, jax and torch read besides their own folders."""

_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


def _environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the user's, which may hold tokens, but where libraries lie."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {
        **kept,
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C.UTF-8",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Each thread's arena reserves address space, which is what is counted.
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **more,
    }


def _search_path(module: str) -> tuple[list[str], list[str], list[str]]:
    """Where the child imports from: the path, what it may read, and what it may list only.

    Installed packages are read as a whole. Of any other folder on the path, such as the one that
    the user works in, only the packages that are needed.
    """
    installed = {str(Path(p).resolve()) for p in (*sysconfig.get_paths().values(), sys.base_prefix)}
    readable = [*installed, sys.prefix, sys.base_prefix]
    path: list[str] = []
    listed: list[str] = []
    for entry in dict.fromkeys(sys.path):
        place = Path(entry or ".").absolute()
        if not place.exists():
            continue
        inside = any(place.resolve().is_relative_to(p) for p in installed)
        if inside or any(place.glob("*.dist-info")):
            path.append(str(place))
            readable.append(str(place))
            continue
        own = [place / name for name in _own_packages(module)]
        found = [p for p in (*own, *(p.with_suffix(".py") for p in own)) if p.exists()]
        if found:
            path.append(str(place))
            listed.append(str(place))
            readable.extend(str(p) for p in found)
    return path, readable, listed


def _own_packages(module: str) -> tuple[str, ...]:
    return ("esper", "esper_functional", "esper_adapters", module.partition(".")[0])


def _error(message: str) -> Exception:
    # The child imports this package before it has restricted itself, and nothing with it.
    from esper.errors import EsperError

    return EsperError(message)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def run(
    function: str,
    payload: bytes = b"",
    *,
    limits: Limits | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Call a function in a child process under limits; see the package's docstring.

    The child is gone when this returns, whatever it did: it, and the processes of its group.

    Args:
        function: `package.module:function`, which takes bytes and gives bytes. The module is to
            import at its top what the function needs.
        environment: variables of the child besides the few that it has anyway. The user's own
            are not passed on.

    Raises:
        ValueError: for a function not so named.
        EsperError: where no child can be started.
    """
    limits = limits or Limits()
    module, colon, name = function.partition(":")
    if not (colon and name.isidentifier() and _is_module(module)):
        raise ValueError(f"expected package.module:function that can be imported, got {function!r}")
    if os.name != "posix":
        raise _error("running under limits needs Linux or macOS; this is neither")
    with contextlib.ExitStack() as stack:
        try:
            place = Path(tempfile.mkdtemp(prefix="esper-sandbox-"))
        except OSError as error:
            raise _error(
                f"no temporary folder for a child process: {error}; set TMPDIR to one that can be"
                " written"
            ) from error
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        folder, outside = place / "own", place / "outside"
        folder.mkdir()
        outside.write_bytes(b"not to be read")
        path, readable, listed = _search_path(module)
        header = json.dumps(
            {
                "function": function,
                "limits": dataclasses.asdict(limits),
                "folder": str(folder),
                "outside": str(outside),
                "path": path,
                "readable": [*_READABLE, *readable],
                "listed": listed,
                "parent": os.getpid(),
            }
        ).encode()
        child = _Child(
            len(header).to_bytes(8, "big") + header + payload,
            limits,
            _environment(folder, environment or {}),
        )
        return child.listen()


class _Child:
    """One child and its pipes."""

    def __init__(self, sent: bytes, limits: Limits, environment: dict[str, str]) -> None:
        self.limits = limits
        self.started = time.monotonic()
        answers, theirs = os.pipe()
        printed, output = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "faulthandler", str(_CHILD), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(theirs,),
                env=environment,
                # A group of its own, which is killed as one, and which Ctrl-C does not reach.
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            os.close(answers)
            os.close(printed)
            raise _error(f"a child process cannot be started: {error}") from error
        finally:
            os.close(theirs)
            os.close(output)
        assert self.process.stdin is not None
        self.input, self.answers, self.printed = self.process.stdin.fileno(), answers, printed
        self.unsent = memoryview(sent)
        self.heard = bytearray()
        self.tail = b""
        self.cut: Limit | None = None
        self.cpu_seconds = 0.0

    def listen(self) -> Outcome:
        """Until it is gone; kills it where it does more than it may."""
        try:
            self._serve()
        finally:
            self._end()
            if self.process.stdin is not None:
                with contextlib.suppress(OSError):
                    self.process.stdin.close()
            os.close(self.answers)
            os.close(self.printed)
        return self._outcome()

    def _serve(self) -> None:
        deadline = self.started + self.limits.wall_seconds
        with selectors.DefaultSelector() as selector:
            for pipe, event, serve in (
                (self.input, selectors.EVENT_WRITE, self._send),
                (self.answers, selectors.EVENT_READ, self._hear),
                (self.printed, selectors.EVENT_READ, self._read),
            ):
                os.set_blocking(pipe, False)
                selector.register(pipe, event, serve)
            # It is over when it closed both, or died and left them to others.
            while self.answers in selector.get_map() or self.printed in selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    self.cut = "wall"
                    return
                ready = selector.select(min(left, 0.05))
                for key, _ in ready:
                    if not key.data():
                        selector.unregister(key.fd)
                if self.cut or (not ready and self._is_over()):
                    return
            # What closed its pipes may still run.
            while not self._is_over():
                if time.monotonic() > deadline:
                    self.cut = "wall"
                    return
                time.sleep(0.002)

    def _send(self) -> bool:
        try:
            self.unsent = self.unsent[os.write(self.input, self.unsent[:_CHUNK]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        if not self.unsent and self.process.stdin is not None:
            self.process.stdin.close()
        return bool(self.unsent)

    def _hear(self) -> bool:
        got = os.read(self.answers, _CHUNK)
        self.heard += got
        if len(self.heard) > self.limits.output_bytes + _CHUNK:
            self.cut = "output"
        return bool(got)

    def _read(self) -> bool:
        got = os.read(self.printed, _CHUNK)
        self.tail = (self.tail + got)[-_TAIL:]
        return bool(got)

    def _end(self) -> None:
        # The group first: while its leader is not waited for, its number is nobody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._wait(0)

    def _is_over(self) -> bool:
        """Whether it has ended. Where the system can tell so without, it is not waited for yet."""
        if not hasattr(os, "waitid"):  # on macOS, before Python 3.13
            return self._wait(os.WNOHANG)
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is not None

    def _wait(self, options: int) -> bool:
        """Whether it has ended; then what it used is known, and its number may be another's."""
        if self.process.returncode is None:
            pid, status, usage = os.wait4(self.process.pid, options)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return self.process.returncode is not None

    def _frames(self) -> dict[bytes, bytes]:
        """The answers, by letter; what is cut short or repeated does not count."""
        found: dict[bytes, bytes] = {}
        left = memoryview(self.heard)
        while len(left) >= _HEADER:
            letter, size = bytes(left[:1]), int.from_bytes(left[1:_HEADER], "big")
            body = left[_HEADER : _HEADER + size]
            if len(body) < size or letter in found:
                break
            found[letter] = bytes(body)
            left = left[_HEADER + size :]
        return found

    def _outcome(self) -> Outcome:
        frames = self._frames()
        told: dict[str, Any] = {
            "output": self.tail.decode("utf-8", "replace"),
            "seconds": time.monotonic() - self.started,
            "protections": _protections(frames.get(b"P")),
        }
        code = self.process.returncode
        if self.cut:
            return Outcome("limit", limit=self.cut, error=self._reason(self.cut), **told)
        if code == -signal.SIGXCPU or (
            code == -signal.SIGKILL and self.cpu_seconds >= self.limits.cpu_seconds
        ):
            return Outcome("limit", limit="cpu", error=self._reason("cpu"), **told)
        if code == -signal.SIGABRT and "bad_alloc" in told["output"]:
            return Outcome("limit", limit="memory", error=self._reason("memory"), **told)
        if code < 0:
            return Outcome("signal", signal=-code, error=f"signal {-code}", **told)
        if b"R" in frames and code == 0:
            return Outcome("finished", frames[b"R"], **told)
        if b"E" in frames:
            error, limit = _failure(frames[b"E"])
            status: Status = "limit" if limit else "raised"
            return Outcome(status, limit=limit, error=error, **told)
        return Outcome("exited", error=f"exit status {code}, and no result", **told)

    def _reason(self, limit: Limit) -> str:
        allowed = {
            "wall": f"{self.limits.wall_seconds:g} s",
            "cpu": f"{self.limits.cpu_seconds:g} s of processor time",
            "memory": f"{self.limits.memory_bytes} bytes",
            "file": f"{self.limits.file_bytes} bytes",
            "output": f"{self.limits.output_bytes} bytes",
        }
        return f"{allowed[limit]} allowed"


def _read_json(frame: bytes | None) -> dict[str, Any]:
    # What came after the payload may be anything.
    try:
        found = json.loads(frame or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _protections(frame: bytes | None) -> Protections:
    told = _read_json(frame)
    if not told:
        return Protections(missing=("all: it ended before it had restricted itself",))
    return Protections(tuple(map(str, told["in_force"])), tuple(map(str, told["missing"])))


def _failure(frame: bytes) -> tuple[str, Limit | None]:
    told = _read_json(frame)
    limit = told.get("limit")
    return str(told.get("error", "an answer that cannot be read"))[:_TAIL], (
        limit if limit in get_args(Limit) else None
    )

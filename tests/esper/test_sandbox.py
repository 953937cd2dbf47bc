"""What a child can do is tried by real children, by functions that try all they can."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.artifacts import read_artifact
from esper.errors import EsperError
from esper.sandbox import Limits, Outcome, Protections, _landlock, run

GENEROUS = Limits(wall_seconds=60, cpu_seconds=30, memory_bytes=1 << 30)

needs_landlock = pytest.mark.skipif(_landlock.version() < 1, reason="no Landlock here")


def contained(function: str, payload: bytes = b"", **limits: float) -> Outcome:
    asked = dataclasses.replace(GENEROUS, **limits)
    return run(f"tests.esper.contained:{function}", payload, limits=asked)


def test_bytes_go_in_and_come_out():
    outcome = contained("echo", bytes(range(256)) * 5000)
    assert outcome.status == "finished", outcome
    assert outcome.result == (bytes(range(256)) * 5000)[::-1]
    assert (str(outcome), outcome.error, outcome.output) == ("finished", "", "")
    assert outcome.seconds > 0


def test_what_it_raises_comes_back_with_what_it_printed():
    outcome = contained("raises", b"here")
    assert (outcome.status, outcome.error) == ("raised", "KeyError: 'here'")
    assert outcome.output == "about to raise\n"
    assert str(outcome) == "raised (KeyError: 'here')"
    assert "returned str, not bytes" in contained("returns_text").error


@pytest.mark.parametrize("function", ["allocates", "allocates_in_torch"])
def test_memory_without_end(function: str):
    outcome = contained(function, memory_bytes=1 << 30)
    assert (outcome.status, outcome.limit) == ("limit", "memory"), outcome
    assert "stopped at its memory limit" in str(outcome)


def test_time_without_end():
    busy = contained("computes_for_ever", cpu_seconds=1)
    assert (busy.status, busy.limit) == ("limit", "cpu"), busy
    assert "1 s of processor time allowed" in str(busy)
    for function in ("sleeps_for_ever", "closes_its_pipes_and_stays"):
        asleep = contained(function, wall_seconds=2)
        assert (asleep.status, asleep.limit) == ("limit", "wall"), asleep
        assert "2 s allowed" in str(asleep)


def test_results_without_end():
    outcome = contained("answers_without_end", output_bytes=1 << 20)
    assert (outcome.status, outcome.limit, outcome.result) == ("limit", "output", None)
    assert "1048576 bytes allowed" in str(outcome)


def test_of_what_it_prints_the_end_is_kept():
    outcome = contained("prints_without_end")
    assert outcome.result == b"printed"
    assert len(outcome.output) == 16 << 10
    assert outcome.output.endswith("x\n")


def test_files_without_end():
    assert contained("writes", b"1000", file_bytes=1000).result == b"written"
    outcome = contained("writes", b"1001", file_bytes=1000)
    assert (outcome.status, outcome.limit) == ("limit", "file"), outcome
    assert contained("writes", b"1", file_bytes=0).result is None


@pytest.mark.parametrize(
    ("function", "number"), [("segfaults", signal.SIGSEGV), ("kills_itself", signal.SIGABRT)]
)
def test_death_by_a_signal(function: str, number: signal.Signals):
    outcome = contained(function)
    assert (outcome.status, outcome.signal) == ("signal", number)
    assert str(outcome) == f"died by {number.name}"
    assert "Fatal Python error" in outcome.output


@pytest.mark.skipif(sys.platform != "linux", reason="signals without a name are of Linux")
def test_death_by_a_signal_without_a_name():
    outcome = contained("dies_by_a_signal_without_a_name")
    number = signal.SIGRTMIN + 6
    assert (outcome.status, outcome.signal) == ("signal", number)
    assert str(outcome) == f"died by signal {number}"


def test_its_group_is_killed_while_its_number_is_its_own(monkeypatch: pytest.MonkeyPatch):
    """Of a number that was waited for, the system may make another process's."""
    kill, seen = os.killpg, []

    def killpg(group: int, number: int) -> None:
        seen.append(Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[0])
        kill(group, number)

    monkeypatch.setattr(os, "killpg", killpg)
    assert contained("echo").status == "finished"
    assert seen == ["Z"]


def test_an_end_without_a_result():
    outcome = contained("exits")
    assert (outcome.status, outcome.error) == ("exited", "exit status 7, and no result")


def test_answers_that_are_forged_or_malformed_are_no_result():
    outcome = contained("forges_an_answer")
    assert outcome.result is None
    assert outcome.status in ("raised", "exited")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server


@pytest.fixture
def tried(tmp_path: Path, listener: socket.socket) -> Iterator[tuple[Outcome, dict[str, str]]]:
    (tmp_path / "secret").write_text("secret")
    mode = (tmp_path / "secret").stat().st_mode
    asked = {
        "outside": str(tmp_path),
        "parent": os.getpid(),
        "port": listener.getsockname()[1],
    }
    outcome = contained("reaches_out", json.dumps(asked).encode())
    assert outcome.status == "finished", outcome
    yield outcome, json.loads(outcome.result or b"")
    if "landlock: files" in outcome.protections.in_force:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["secret"]
        assert (tmp_path / "secret").read_text() == "secret"
        assert (tmp_path / "secret").stat().st_mode == mode


FILES = (
    "writes outside", "reads outside", "lists outside", "removes outside", "reads passwords",
    "reads its parent's variables", "writes in its folder",
)  # fmt: skip
CALLS = (
    "changes a mode outside", "connects", "sends a datagram", "opens a unix socket", "forks",
    "runs a program", "execs", "execs itself", "signals its parent", "traces its parent",
    "unshares", "mounts", "raises its limits", "moves to other processors",
    "leaves its parent",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_nothing_reaches_out(tried: tuple[Outcome, dict[str, str]]):
    outcome, found = tried
    assert set(found) == {*FILES, *CALLS, "starts a thread"}
    assert found["starts a thread"] == "done"
    held = outcome.protections.in_force
    if "landlock: files" in held:
        assert {found[what] for what in FILES} == {"EACCES"}, found
    if "seccomp" in held:
        assert {found[what] for what in CALLS} == {"EPERM"}, found


def test_all_protections_are_told_of_as_in_force_or_missing():
    outcome = contained("echo")
    for protection in ("landlock", "seccomp", "capabilities"):
        told = [p for p in outcome.protections.in_force if p.startswith(protection)]
        lacking = [p for p in outcome.protections.missing if p.startswith(f"{protection}: ")]
        assert bool(told) != bool(lacking), outcome.protections
    if sys.platform == "linux":
        assert {"memory", "processor time", "file size"} <= set(outcome.protections.in_force)
    if _landlock.version() >= 1:
        assert "landlock: files" in outcome.protections.in_force


def test_what_never_restricted_itself_claims_nothing(tmp_path: Path):
    outcome = contained("echo", wall_seconds=0.01)
    assert outcome.limit == "wall"
    assert outcome.protections == Protections(
        missing=("all: it ended before it had restricted itself",)
    )


def test_without_libseccomp_it_says_so(tmp_path: Path):
    # An importable pyseccomp that finds no library, as on a machine without it.
    (tmp_path / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')\n")
    script = (
        "import sys\nfrom esper.sandbox import run\n"
        "found = run('pyseccomp_absent:echo').protections\n"
        "assert 'seccomp' not in found.in_force\n"
        "print(*found.missing)\n"
    )
    (tmp_path / "pyseccomp_absent.py").write_text("def echo(x): return x\n")
    # A folder that packages were installed into, which is then searched as a whole.
    site = tmp_path / "installed"
    (site / "pyseccomp-0.dist-info").mkdir(parents=True)
    for name in ("pyseccomp.py", "pyseccomp_absent.py"):
        (tmp_path / name).rename(site / name)
    path = os.pathsep.join([str(site), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "seccomp: libseccomp cannot be used (Unable to find libseccomp)" in done.stdout
    assert "install it" in done.stdout


def test_the_users_variables_stay_outside(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", "secret")
    found = json.loads(contained("variables").result or b"")
    assert "SOME_TOKEN" not in found
    assert not any("secret" in value for value in found.values())
    assert found["HOME"] == found["TMPDIR"]
    assert found["HOME"] != os.environ.get("HOME")
    given = run("tests.esper.contained:variables", environment={"MORE": "1"})
    assert json.loads(given.result or b"")["MORE"] == "1"


def test_children_of_a_child_that_may_have_some_end_with_it():
    outcome = contained("forks_and_leaves", may_fork=True)
    assert outcome.status == "finished", outcome
    pid = int(outcome.result or b"0")
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline, f"process {pid} outlived its group"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_ends_with_its_parent(tmp_path: Path):
    script = (
        "from esper.sandbox import run, Limits\n"
        "limits = Limits(wall_seconds=300, file_bytes=100)\n"
        "run('tests.esper.contained:tells_its_number_and_sleeps', limits=limits)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
    )
    deadline = time.monotonic() + 60
    try:
        while not (told := list(tmp_path.glob("esper-sandbox-*/own/number"))):
            assert time.monotonic() < deadline, "the child did not get to its function"
            time.sleep(0.01)
        pid = int(told[0].read_text())
        assert _runs(pid)
    finally:
        parent.kill()
        parent.wait()
    while _runs(pid):
        assert time.monotonic() < deadline, f"process {pid} outlived its parent"
        time.sleep(0.01)


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    contained("writes", b"10", file_bytes=100)
    contained("sleeps_for_ever", wall_seconds=1)
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(EsperError, match="no temporary folder .* set TMPDIR"):
        contained("echo")


def test_jax_and_torch_compute_inside():
    assert contained("uses_both", memory_bytes=2 << 30).result == b"48.742 4.0"


def test_a_kernel_is_compiled_inside():
    found = contained("compiles", memory_bytes=2 << 30)
    assert found.status == "finished", found
    assert read_artifact(found.result or b"").manifest.blueprint == "low_rank"


@pytest.mark.parametrize("name", ["json", "json:", "absent_module:f", ":f", "json:a.b"])
def test_functions_that_are_not_so_named(name: str):
    with pytest.raises(ValueError, match=r"expected package\.module:function"):
        run(name)


def test_a_function_that_is_not_there():
    assert "AttributeError" in contained("absent").error


@pytest.mark.parametrize(
    "wrong", [{"wall_seconds": 0}, {"memory_bytes": -1}, {"file_bytes": -1}, {"cores": 0}]
)
def test_limits_that_are_none(wrong: dict[str, int]):
    with pytest.raises(ValueError, match=f"the limit {next(iter(wrong))} must be positive"):
        Limits(**wrong)


@needs_landlock
def test_landlock_is_refused_where_threads_would_escape_it():
    script = (
        "import threading, time\n"
        "from esper.sandbox import _landlock\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "try:\n    _landlock.restrict({})\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "there are other threads already" in done.stdout, done.stderr

"""`esper worker` as a user meets it: a real process, real signals."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esper.contracts import BlueprintState, KernelSignature
from esper.tezzeret import CompileJob, load_blueprint
from esper.tezzeret.service import request_of
from esper.urza import Library
from tests.esper.test_cli import ENVIRONMENT, esper_here
from tests.esper.test_compile_pool import SLOW

SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(4,))


def asked(name: str = "low_rank", seed: int = 0):
    return request_of(CompileJob(load_blueprint(name), SIGNATURE, {}, seed))


@contextmanager
def worker(folder: Path, *arguments) -> Iterator[subprocess.Popen[str]]:
    """`esper worker` in a folder, which is gone when the block ends."""
    command = [sys.executable, "-m", "esper.cli", "worker", *map(str, arguments)]
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=ENVIRONMENT, cwd=folder
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


def errors_of(folder: Path) -> str:
    return (folder / "errors.txt").read_text()


def ended(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """The exit status, and what it printed from here on."""
    assert process.stdout is not None
    said = process.stdout.read()
    status = process.wait(120)
    assert "Traceback" not in errors_of(folder) + said, errors_of(folder)
    return status, said


def until(true, process: subprocess.Popen[str], folder: Path) -> None:
    limit = time.monotonic() + 120
    while not true():
        assert process.poll() is None, errors_of(folder)
        assert time.monotonic() < limit, errors_of(folder)
        time.sleep(0.02)


def test_a_worker_compiles_tells_how_it_does_and_ends_with_its_work_finished(tmp_path):
    library = Library(tmp_path / "lib")
    first = library.submit(asked()).blueprint_id
    options = ("--library", "lib", "--bus", "sqlite:bus.db", "--name", "mine", "--metrics", 0)
    with worker(tmp_path, *options) as process:
        until(lambda: library.blueprint(first).state is BlueprintState.VALIDATED, process, tmp_path)
        found = re.search(r"metrics at (\S+)", errors_of(tmp_path))
        assert found is not None
        with urllib.request.urlopen(found[1], timeout=60) as answer:
            metrics = answer.read().decode()
        assert 'esper_worker_blueprints_total{outcome="compiled"} 1.0' in metrics
        slow = library.submit(request_of(SLOW)).blueprint_id
        compiling = BlueprintState.COMPILING
        until(lambda: library.blueprint(slow).state is compiling, process, tmp_path)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        status, said = ended(process, tmp_path)
    assert status == 0
    assert "worker mine compiles for lib (Ctrl-C ends it)" in said
    assert "2 compiled, 0 failed" in said
    assert "ends when what is begun is done" in errors_of(tmp_path)
    assert library.blueprint(slow).state is BlueprintState.VALIDATED


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)])
def test_a_worker_that_may_not_finish_gives_back_what_is_begun(tmp_path, numbers):
    library = Library(tmp_path / "lib")
    slow = library.submit(request_of(SLOW)).blueprint_id
    grace = 3600 if len(numbers) > 1 else 0
    with worker(tmp_path, "--library", "lib", "--grace", grace) as process:
        compiling = BlueprintState.COMPILING
        until(lambda: library.blueprint(slow).state is compiling, process, tmp_path)
        for number in numbers:
            time.sleep(0.2)
            process.send_signal(number)
        status, said = ended(process, tmp_path)
    assert status == (130 if signal.SIGINT in numbers else 0)
    assert "0 compiled, 0 failed, 1 given back" in said
    record = library.blueprint(slow)
    assert (record.state, record.attempts) == (BlueprintState.UNVALIDATED, 0)


def test_a_worker_goes_on_without_a_bus_that_is_away(tmp_path):
    library = Library(tmp_path / "lib")
    first = library.submit(asked()).blueprint_id
    # Nothing listens there.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    bus = f"redis://127.0.0.1:{port}/0"
    options = ("--library", "lib", "--bus", bus, "--once", "--grace", 2)
    with worker(tmp_path, *options) as process:
        status, said = ended(process, tmp_path)
    assert status == 0
    assert "1 compiled, 0 failed" in said
    told = (
        f"the worker goes on without the bus until it is there: the Redis server 127.0.0.1:{port}"
    )
    assert told in errors_of(tmp_path)
    assert library.blueprint(first).state is BlueprintState.VALIDATED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bus", "carrier-pigeon:"), "names no bus: expected memory:, sqlite:PATH"),
        (("--library", "taken"), "the library folder .*taken cannot be used"),
        (("--workers", 0), "greater than or equal to 1"),
        (
            ("--metrics", "PORT"),
            "metrics cannot be served at 127.0.0.1, port .*Choose another port, or 0",
        ),
        (("--metrics", 0, "--metrics-host", "203.0.113.7"), "at 203.0.113.7, port 0: .*address"),
    ],
)
def test_what_is_asked_wrongly_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("no folder")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = [port if option == "PORT" else option for option in options]
        done = esper_here("worker", "--once", *options, check=2)
    assert re.search(message, " ".join(done.output.split())), done.output


def test_a_database_that_is_away_is_waited_for_until_ctrl_c(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    place = f"postgresql://esper:hush@127.0.0.1:{port}/esper"
    monkeypatch.setitem(ENVIRONMENT, "ESPER_LIBRARY__DATABASE", place)
    monkeypatch.setitem(ENVIRONMENT, "ESPER_LIBRARY__BLOBS", str(tmp_path / "files"))
    with worker(tmp_path) as process:
        told = f"esper: the library is away, and waited for: .* port {port} failed"
        until(lambda: re.search(told, errors_of(tmp_path)), process, tmp_path)
        process.send_signal(signal.SIGINT)
        status, _ = ended(process, tmp_path)
    assert status == 130
    assert "esper: interrupted" in errors_of(tmp_path)
    assert "hush" not in errors_of(tmp_path)


def test_a_service_that_is_away_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_LIBRARY__TOKEN", "a-token")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = esper_here("worker", "--once", "--library", f"http://127.0.0.1:{port}", check=1)
    assert "esper:" in done.output
    assert "a-token" not in done.output

"""The command line as a user meets it: real processes, real signals, real damage."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.checkpoints import checkpoint_steps
from esper.checkpoints._manifest import step_place
from esper.cli._app import app
from tests.depth import some

BACKENDS = ["jax", "torch"]

# A short run through all that can happen: grafts, ramps, verdicts, checkpoints.
CONFIG = """
steps: 240
decide_every: 10
loading_steps: 3
ramp_steps: 10
trial_steps: 25
patience: 1
min_improvement: 0.5
checkpoint_every: 40
variants: 2
seeds_per_layer: 2
blueprint_sizes: {width: 8}
"""


ENVIRONMENT = {
    **os.environ,
    "COLUMNS": "200",
    "NO_COLOR": "1",
    # Many processes compile the same programs; jax can keep them.
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"esper-jax-{os.getuid()}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def esper(*arguments, check=None, **options):
    done = subprocess.run(
        [sys.executable, "-m", "esper.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        **options,
    )
    assert "Traceback" not in done.stderr + done.stdout
    if check is not None:
        assert done.returncode == check, done.stderr + done.stdout
    return done


def esper_here(*arguments, check, cwd="."):
    """The same in this process, which costs no start."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # A window as wide as that of the processes, where a test asks for no other.
        columns = {"COLUMNS": os.environ.get("COLUMNS", ENVIRONMENT["COLUMNS"])}
        with contextlib.chdir(cwd):
            done = CliRunner().invoke(app, list(map(str, arguments)), env=columns)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    # Any other exception would have been a traceback.
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert done.exit_code == check, done.output
    return done


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def entries(run: Path) -> list[dict[str, object]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["entry"] for line in lines]


def end_of(run: Path) -> dict[str, str]:
    last = json.loads((run / "events.jsonl").read_text().splitlines()[-1])["entry"]
    assert last["name"] == "end"
    return last


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "short.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def finished(place) -> dict[str, Path]:
    """One whole run of each backend."""
    runs = {}
    for backend in BACKENDS:
        runs[backend] = place / f"whole-{backend}"
        esper("grow", "--task", "spirals", "--backend", backend, "--config", place / "short.yaml",
              "--out", runs[backend], check=0)  # fmt: skip
    return runs


def begin(place: Path, out: Path, backend: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "esper.cli", "grow", "--task", "spirals", "--backend", backend,
         "--config", str(place / "short.yaml"), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )  # fmt: skip


def wait_for(path: Path, lines: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended before line {lines}: {process.communicate()}")


# Recording, replaying, resuming


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_leaves_the_folder_of_a_run(finished, backend):
    run = finished[backend]
    assert {p.name for p in run.iterdir()} == {
        "run.json", "events.jsonl", "metrics.jsonl", "checkpoints", "regions.npz", "report.html",
    }  # fmt: skip
    kinds = {
        json.loads(line)["entry"]["kind"]
        for line in (run / "events.jsonl").read_text().splitlines()
    }
    assert {"load", "activate", "ramp", "health", "mark"} <= kinds
    assert kinds & {"fossilize", "unload"}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(0, 241, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_replay_folds_to_every_digest_that_was_recorded(finished, backend):
    done = esper_here("replay", finished[backend], check=0)
    assert done.stdout.count("equal") == 8  # six checkpoints, the end, the measurements
    assert f"digest {end_of(finished[backend])['seeds']}" in done.stdout


# Where it is killed decides nothing by itself: test_exact_runs.py stops runs at twenty steps.
@pytest.mark.parametrize("lines", some([2, 14, 21], 14))
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_and_resumed_is_bit_equal_to_uninterrupted(place, finished, backend, lines):
    run = place / f"killed-{backend}-{lines}"
    process = begin(place, run, backend)
    wait_for(run / "metrics.jsonl", lines, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    esper("grow", "--resume", run, check=0)
    assert end_of(run) == end_of(finished[backend])
    # Not the end alone: the same events in the same order.
    whole = (finished[backend] / "events.jsonl").read_text().splitlines()
    again = (run / "events.jsonl").read_text().splitlines()
    assert [json.loads(a)["entry"] for a in again] == [json.loads(w)["entry"] for w in whole]
    steps = [json.loads(r)["step"] for r in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(0, 241, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_leaves_a_run_that_resumes(place, finished, backend):
    run = place / f"interrupted-{backend}"
    process = begin(place, run, backend)
    wait_for(run / "metrics.jsonl", 12, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert f"--resume {run}" in told.replace("\n", " ")
    esper_here("replay", run, check=0)
    esper("grow", "--resume", run, check=0)
    assert end_of(run) == end_of(finished[backend])


def test_resuming_a_finished_run_changes_nothing_of_its_record(finished):
    before = tree(finished["jax"])
    esper_here("grow", "--resume", finished["jax"], check=0)
    after = tree(finished["jax"])
    assert {n: d for n, d in after.items() if n not in ("report.html", "regions.npz")} == {
        n: d for n, d in before.items() if n not in ("report.html", "regions.npz")
    }


def test_several_seeds_are_a_study_that_resumes(place):
    (place / "tiny.yaml").write_text(CONFIG + "steps: 30\nvariants: 1\n")
    study = place / "study"
    esper_here("grow", "--task", "spirals", "--config", place / "tiny.yaml", "--seeds", 2,
          "--out", study, check=0)  # fmt: skip
    assert {p.name for p in study.iterdir()} == {
        "study.json", "seed-0", "seed-1", "report.html", "library",
    }  # fmt: skip
    # These runs end in the middle of a ramp.
    assert "RAMP" in {e["kind"].upper() for e in entries(study / "seed-0")}
    for run in ("seed-0", "seed-1"):
        esper_here("replay", study / run, check=0)
    ends = [end_of(study / f"seed-{i}") for i in (0, 1)]
    assert ends[0]["arrays"] != ends[1]["arrays"]
    # One run is lost; resuming makes it again as it was.
    for path in sorted((study / "seed-1").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (study / "seed-1").rmdir()
    esper_here("grow", "--resume", study, check=0)
    assert end_of(study / "seed-1") == ends[1]
    other = esper_here("grow", "--task", "spirals", "--seeds", 2, "--out", study, check=2)
    assert "holds another study" in other.stderr


# Bad input: a message, an exit status, and nothing lost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grow", "--task", "spirlas"], "unknown task 'spirlas'.*did you mean 'spirals'"),
        (["grow", "--task", "digits", "--backend", "tensorflow"], "unknown backend 'tensorflow'"),
        (["grow"], "say what to train on"),
        (["grow", "--task", "spirals", "--config", "none.yaml"], "none.yaml cannot be read"),
        (["grow", "--task", "spirals", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["grow", "--resume", "nowhere"], "nowhere holds no run"),
        (["grow", "--resume", "nowhere", "--task", "digits"], "leave out --task"),
        (["replay", "nowhere"], "nowhere holds no run"),
        (["kernels", "compile", "lowrank", "--in", "2", "--out", "3"], "did you mean 'low_rank'"),
        (["grwo"], "No such command 'grwo'"),
    ],
)
def test_bad_usage_exits_2_with_a_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = esper_here(*arguments, check=2)
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 3", "unknown key 'stpes'; did you mean 'steps'"),
        ("blueprints: [residul_mlp]", "did you mean 'residual_mlp'"),
        ("learning_rate: 1000.0", "learning_rate: Input should be less than or equal to 10"),
        ("grow_at: [layers.7]", "no layer's path matches 'layers.7'; the nearest are"),
        ("batch_size: 1000", "batch_size is 1000, and the training part of spirals has 194"),
        ("blueprint_sizes: {depth: 3}", "has no size depth: it has width"),
    ],
)
def test_a_bad_configuration_exits_2_and_writes_no_run(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    done = esper_here("grow", "--task", "spirals", "--config", "c.yaml", "--out", "run", check=2)
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_is_in_use_is_refused_and_kept(finished, tmp_path):
    before = tree(finished["jax"])
    done = esper_here("grow", "--task", "digits", "--out", finished["jax"], check=2)
    assert f"holds another run: go on with it by --resume {finished['jax']}" in done.stderr
    assert tree(finished["jax"]) == before
    (tmp_path / "thesis.tex").write_text("years of work")
    done = esper_here("grow", "--task", "digits", "--out", tmp_path, check=2)
    assert "is not empty and holds no run" in done.stderr
    done = esper_here("grow", "--task", "digits", "--out", tmp_path / "thesis.tex", check=2)
    assert "is a file" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.fixture(scope="module")
def killed(place, finished) -> Path:
    """A run that was killed in its middle."""
    run = place / "killed"
    process = begin(place, run, "jax")
    wait_for(run / "metrics.jsonl", 16, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return run


@pytest.fixture
def interrupted(killed, tmp_path) -> Path:
    """A copy of it, with a library of its own."""
    for folder, name in ((killed, "run"), (killed.parent / "library", "library")):
        shutil.copytree(folder, tmp_path / name)
    return tmp_path / "run"


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def refused(run: Path, message: str, command: tuple[str, ...] = ("grow", "--resume")) -> None:
    before = tree(run)
    done = esper_here(*command, run, check=1)
    assert message in done.stderr.replace("\n", " ")
    assert tree(run) == before


def test_a_flipped_bit_in_the_ledger(interrupted):
    flip(interrupted / "events.jsonl")
    refused(interrupted, "is damaged at line")
    refused(interrupted, "is damaged at line", ("replay",))


def test_a_flipped_bit_in_the_checkpoint(interrupted):
    # A kill may leave half of one, which is none.
    newest = step_place(
        interrupted / "checkpoints", checkpoint_steps(interrupted / "checkpoints")[-1]
    )
    array = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip(array)
    refused(interrupted, "delete that folder to go on from the checkpoint before it")
    refused(interrupted, "is damaged", ("replay",))
    # Which is what the message says, and it works.
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    esper_here("grow", "--resume", interrupted, check=0)


def test_a_flipped_bit_in_an_artifact(interrupted):
    for path in (interrupted.parent / "library" / "kernels").rglob("*.kernel"):
        flip(path)
    refused(interrupted, "is damaged: its bytes have the SHA-256")


def test_lines_cut_from_the_ledger(interrupted):
    ledger = interrupted / "events.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:1]))
    refused(interrupted, "has seen")
    refused(interrupted, "has seen", ("replay",))


def test_a_run_json_that_was_changed(interrupted):
    path = interrupted / "run.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    refused(interrupted, "is damaged at line 1")


def test_a_run_json_that_was_changed_before_anything_happened(place, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG + "controller: none\n")
    run = tmp_path / "run"
    esper_here("grow", "--task", "spirals", "--config", tmp_path / "c.yaml", "--out", run, check=0)
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(lines[:0]))
    path = run / "run.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.03'))
    refused(run, "or run.json was changed")


def test_damaged_measurements_are_named_and_can_be_done_without(interrupted):
    metrics = interrupted / "metrics.jsonl"
    whole = metrics.read_text()
    for bad in (whole.replace('"step"', '"stdp"', 1), "3\n" + whole, "{\n" + whole):
        metrics.write_text(bad)
        refused(interrupted, "metrics.jsonl is damaged at line 1")
    metrics.unlink()
    esper_here("grow", "--resume", interrupted, check=0)
    esper_here("grow", "--resume", interrupted, check=0)


def test_two_processes_do_not_train_one_run(interrupted):
    with (interrupted / "run.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = esper_here("grow", "--resume", interrupted, check=2)
    assert "is being trained by another process" in done.stderr


def test_a_run_moves_with_its_library(interrupted, finished, tmp_path):
    moved = tmp_path / "elsewhere [b] ü"
    moved.mkdir()
    (interrupted.parent / "library").rename(moved / "library")
    interrupted.rename(moved / "run")
    done = esper("grow", "--resume", "run", cwd=moved, check=0)
    assert "report: run/report.html" in done.stdout
    assert end_of(moved / "run") == end_of(finished["jax"])


def test_replay_before_anything_happened(place):
    process = begin(place, place / "early", "jax")
    wait_for(place / "early" / "metrics.jsonl", 1, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    esper_here("replay", place / "early", check=0)


def test_a_full_disk_fails_with_a_message_and_the_run_resumes(place, finished, small_disk):
    disk = small_disk(700)
    run = disk / "run"
    library = place / "library"
    (place / "full.yaml").write_text(CONFIG + f"library: {library}\n")
    done = esper("grow", "--task", "spirals", "--config", place / "full.yaml", "--out", run)
    assert done.returncode == 1, done.stderr
    assert f"Then go on with --resume {run}" in done.stderr
    esper_here("replay", run, check=0)
    grown = subprocess.run(
        ["mount", "-o", "remount,size=32m", str(disk)], capture_output=True, check=False
    )
    assert grown.returncode == 0
    esper("grow", "--resume", run, check=0)
    assert end_of(run) | {"arrays": ""} == end_of(finished["jax"]) | {"arrays": ""}
    assert end_of(run)["arrays"] == end_of(finished["jax"])["arrays"]


def test_a_folder_that_cannot_be_written(tmp_path, place):
    # Root may write anywhere but below a file.
    (tmp_path / "file").write_text("")
    done = esper_here("grow", "--task", "spirals", "--config", place / "short.yaml",
                      "--out", tmp_path / "file" / "run", check=2)  # fmt: skip
    assert "cannot be" in done.stderr


def test_kernels_are_compiled_and_listed(tmp_path):
    compiled = esper("kernels", "compile", "low_rank", "--in", 3, "--out", 4, cwd=tmp_path, check=0)
    kernel_id = compiled.stdout.strip()
    assert len(kernel_id) == 64
    listed = esper("kernels", "list", cwd=tmp_path, check=0)
    assert kernel_id[:16] in listed.stdout
    assert "3->4 float32" in listed.stdout


def test_help_and_version_need_no_framework(tmp_path):
    assert "grow" in esper("--help", check=0).stdout
    assert esper("--version", check=0).stdout.startswith("esper ")

"""`esper compare`: from a command to a verdict, or to the reasons why there is none."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.esper.test_cli import ENVIRONMENT, esper_here, tree
from tests.esper.test_comparison_run import records

CONFIG = """
steps: 30
decide_every: 10
loading_steps: 3
ramp_steps: 5
trial_steps: 10
checkpoint_every: 30
variants: 1
seeds_per_layer: 2
blueprint_sizes: {width: 8}
"""
MINE = "controller: fixed\ngraft_every: 10\nmax_grafts: 1\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparisons")
    (folder / "short.yaml").write_text(CONFIG)
    (folder / "mine.yaml").write_text(MINE)
    return folder


def arguments(place: Path, seeds: int) -> list[object]:
    return ["compare", "--task", "spirals", "--backend", "torch", "--treatment", "mine",
            "--arm", f"mine={place / 'mine.yaml'}", "--control", "static-small",
            "--budget", "steps", "--config", place / "short.yaml", "--seeds", seeds]  # fmt: skip


@pytest.fixture(scope="module")
def decided(place) -> tuple[Path, str]:
    """A comparison with a verdict, and what was printed of it."""
    done = esper_here(*arguments(place, 6), "--smallest-effect", 0.9,
                      "--out", place / "decided", check=0)  # fmt: skip
    return place / "decided", done.stdout


def test_a_verdict_is_printed_and_its_report_written(decided):
    folder, told = decided
    assert "mine at equal steps, 6 seeds, test accuracy" in told
    assert "equivalent" in told
    assert f"report: {folder / 'report.html'}" in told
    assert {"report.html", "table.csv", "table.json", "table.tex", "differences.csv"} <= {
        path.name for path in folder.iterdir()
    }
    asked = json.loads((folder / "comparison.json").read_bytes())["comparison"]
    assert asked["own_arms"] == {"mine": {"controller": "fixed", "graft_every": 10,
                                          "max_grafts": 1}}  # fmt: skip
    assert asked["values"]["steps"] == 30


def test_resuming_what_has_ended_says_the_same_and_changes_nothing(decided):
    folder, told = decided
    before = tree(folder)
    assert esper_here("compare", "--resume", folder, check=0).stdout == told
    assert tree(folder) == before


def test_another_comparison_in_its_folder_is_refused_by_what_differs(place, decided):
    before = tree(decided[0])
    done = esper_here(*arguments(place, 7), "--out", decided[0], check=2)
    told = done.stderr.replace("\n", " ")
    assert "another comparison, of which seeds, smallest_effect differ" in told
    assert f"--resume {decided[0]}, or give another --out" in told
    assert tree(decided[0]) == before


def test_a_refused_verdict_is_reported_and_exits_1(place):
    folder = place / "refused"
    done = esper_here(*arguments(place, 2), "--out", folder, check=1)
    # Before a step is trained, and at the end.
    first, *_, last = done.stderr.strip().splitlines()
    assert "with 2 seeds and 1 control there will be no verdict: expected at least 6" in first
    assert "no verdict under equal steps; see the reasons above" in last
    assert "too few seeds: with 2 no sign-flip test" in done.stdout
    assert "too few seeds" in (folder / "report.html").read_text()
    again = esper_here("compare", "--resume", folder, check=1)
    assert "too few seeds" in again.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "say what to train on"),
        (["--task", "spirlas"], "did you mean 'spirals'"),
        (["--task", "spirals", "--control", "statik-final"],
         "unknown arm 'statik-final'.*did you mean 'static-final'"),
        (["--task", "spirals", "--treatment", "hueristic"], "did you mean 'heuristic'"),
        (["--task", "spirals", "--treatment", "scratch"], "'scratch' does not grow"),
        (["--task", "spirals", "--backend", "tensorflow"], "backend: .*'jax' or 'torch'"),
        (["--task", "spirals", "--budget", "time"], "'steps' or 'flops', got 'time'"),
        (["--task", "spirals", "--metric", "speed"], "'test_accuracy', 'test_loss' or 'reward'"),
        (["--task", "spirals", "--smallest-effect", "0"], "smallest effect of interest above 0"),
        (["--task", "spirals", "--config", "none.yaml"], "none.yaml cannot be read"),
        (["--task", "spirals", "--config", "typo.yaml"], "unknown key 'stpes'.*'steps'"),
        (["--task", "spirals", "--config", "whose.yaml"], "have 'controller', which the compar"),
        (["--task", "spirals", "--arm", "mine"], "--arm takes NAME=FILE, such as .*got 'mine'"),
        (["--task", "spirals", "--arm", "mine=none.yaml"], "none.yaml cannot be read"),
        (["--task", "spirals", "--arm", "mine=typo.yaml"],
         "arm 'mine' cannot be run .*unknown key 'stpes'"),
        (["--task", "spirals", "--arm", "random=mine.yaml"], "'random' is Esper's own"),
        (["--task", "spirals", "--arm", "a=mine.yaml", "--arm", "a=typo.yaml"], "'a' twice"),
        (["--task", "spirals", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["--task", "spirals", "--workers", "0"], "Invalid value for '--workers'"),
        (["--resume", "nowhere"], "nowhere holds no comparison"),
        (["--resume", "nowhere", "--arm", "a=mine.yaml", "--seeds", "3", "--out", "x"],
         "leave out --arm, --seeds, --out"),
    ],
)  # fmt: skip
def test_bad_usage_exits_2_with_a_message_and_writes_nothing(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    files = {"mine.yaml": MINE, "typo.yaml": "stpes: 3\n", "whose.yaml": "controller: fixed\n"}
    for name, text in files.items():
        Path(name).write_text(text)
    done = esper_here("compare", *given, check=2)
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_ctrl_c_stops_all_workers_and_the_comparison_goes_on(place, tmp_path):
    longer = "steps: 600\ndecide_every: 50\ncheckpoint_every: 200\n"
    (tmp_path / "long.yaml").write_text(CONFIG + longer)
    (tmp_path / "mine.yaml").write_text(MINE)
    folder = tmp_path / "c"
    command = [*arguments(tmp_path, 2), "--workers", 2, "--out", folder]
    command[command.index(tmp_path / "short.yaml")] = tmp_path / "long.yaml"
    process = subprocess.Popen(
        [sys.executable, "-m", "esper.cli", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if any(file.stat().st_size for file in folder.rglob("metrics.jsonl")):
            break
        time.sleep(0.01)
    # As a terminal does it: every process of the group is told.
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    lines = told.strip().splitlines()
    assert lines[-1] == f"esper: stopped; go on with esper compare --resume {folder}"
    assert [line for line in lines if "stopping after this step" in line] == lines[-2:-1]
    # What the standard library keeps for semaphores goes a moment after its owner.
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    begun = records(folder)
    assert 0 < len(begun) < 4
    esper_here("compare", "--resume", folder, check=1)
    ended = records(folder)
    assert len(ended) == 4
    for name, (ledger, rows) in begun.items():
        assert ended[name][0].startswith(ledger)
        assert ended[name][1][: max(0, len(rows) - 1)] == rows[:-1]

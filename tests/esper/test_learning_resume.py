"""A run of learning that is killed and goes on is the run that was not, bit by bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from esper.checkpoints import CheckpointError, checkpoint_steps, tree_digest
from esper.errors import InputError, Interrupted
from tests.depth import depth
from tests.esper.learning_games import table
from tests.esper.learning_process import ITERATIONS, SETTINGS, learn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, learn(folder)


def same(found, folder, whole):
    theirs, expected = whole
    assert tree_digest(found.state) == tree_digest(expected.state)
    assert tree_digest(found.policy) == tree_digest(expected.policy)
    assert found.metrics == expected.metrics
    assert (folder / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()


def test_a_run_that_is_killed_goes_on_to_the_same(tmp_path, whole):
    lasts = sorted(random.Random(5).sample(range(2, ITERATIONS), depth(1, 6)))
    for last in lasts:
        done = subprocess.run(
            [sys.executable, "-m", "tests.esper.learning_process", str(tmp_path), str(last)],
            cwd=ROOT,
            check=False,
            capture_output=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(checkpoint_steps(tmp_path / "checkpoints")) <= 3
    same(learn(tmp_path), tmp_path, whole)
    assert checkpoint_steps(tmp_path / "checkpoints") == [ITERATIONS - 2, ITERATIONS]


def test_two_trainings_at_once_in_one_folder_are_refused(tmp_path, whole):
    refused = []

    def told(row):
        with pytest.raises(InputError, match="another one keeps its own there; stop it first") as e:
            learn(tmp_path)
        refused.append(e)

    same(learn(tmp_path, told=told), tmp_path, whole)
    assert len(refused) == ITERATIONS
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match="a training cannot be kept in .*file: .*name another"):
        learn(file)
    assert file.read_text() == "mine"


def test_a_folder_holds_the_rows(whole):
    _, expected = whole
    rows = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    assert rows == expected.metrics
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS))


def test_a_run_that_is_asked_to_stop_is_saved_and_goes_on(tmp_path, whole):
    rows = []
    with pytest.raises(Interrupted, match="stopped before iteration 3; go on with the same folder"):
        learn(tmp_path, told=rows.append, stop=lambda: len(rows) == 3)
    assert checkpoint_steps(tmp_path / "checkpoints") == [2, 3]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": 3, "los')
    same(learn(tmp_path, told=rows.append), tmp_path, whole)
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS))
    # What is whole is only read.
    same(learn(tmp_path, told=rows.append), tmp_path, whole)
    assert len(rows) == ITERATIONS


def test_what_was_stopped_at_once_begins(tmp_path):
    with pytest.raises(Interrupted, match="stopped before iteration 0; go on with the same folder"):
        learn(tmp_path, stop=lambda: True)
    assert checkpoint_steps(tmp_path / "checkpoints") == []


def test_another_run_does_not_go_on_from_it(whole):
    folder, _ = whole
    faster = {"settings": SETTINGS.__class__(**vars(SETTINGS) | {"rate": 0.1, "clip": 0.3})}
    for change, message in (
        (faster, "holds a run with another clip, rate; go on with what it was begun"),
        ({"key": jax.random.key(4)}, "holds a run with another policy or key"),
        ({"policy": table(4, 1)}, "holds a run with another policy or key"),
        ({"kept": 0}, "kept is a whole number from 1, and not 0"),
    ):
        with pytest.raises(InputError, match=message):
            learn(folder, **change)


def test_metrics_that_are_missing_are_asked_for(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(CheckpointError, match="2 lines, and the checkpoint beside it is of iter"):
        learn(tmp_path / "run")
    metrics.unlink()
    with pytest.raises(CheckpointError, match="0 lines, and the checkpoint beside it is of iter"):
        learn(tmp_path / "run")

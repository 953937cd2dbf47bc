"""What listens to the bus and writes: JSON lines, TensorBoard, Prometheus."""

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2

from esper.errors import InputError
from esper.nissa import PrometheusWriter, TensorBoardWriter, make_writers
from esper.nissa._tensorboard import MOST_SEEDS
from esper.oona import InProcessBus, Topic


def row(step: int, loss: float | None = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "train_loss": loss, "validation_loss": 0.6, "validation_accuracy": 0.7,
        "test_loss": 0.65, "test_accuracy": 0.68, "stages": [[0, 2], [4, 1]],
        "alphas": [[0.0, 0.25], [1.0, 0.0]], "health": [[None, 0.9], [0.8, None]],
        "parameters": 84, "compilations": 3, "seconds": {"train": 1.5, "evaluate": 0.5},
        "learning_rate": 0.01, "flops": 1e9, "rollbacks": 0,
    } | more  # fmt: skip


LOAD = {"kind": "load", "step": 20, "layer": 0, "seed": 1, "kernel": "ab", "reason": "stuck"}
BACK = {"kind": "rollback", "step": 60, "to": 20, "lines": 1, "cause": "NaN", "remedy": "halve"}


def read_board(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def scalars(board: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(int(event.step), float(event.value)) for event in board.Scalars(tag)]


def texts(board: EventAccumulator) -> list[tuple[int, str]]:
    found = board.Tensors("decisions")
    return [(int(e.step), e.tensor_proto.string_val[0].decode()) for e in found]


# TensorBoard


def test_tensorboard_reads_what_was_measured_and_decided(tmp_path):
    bus = InProcessBus()
    with TensorBoardWriter(tmp_path, bus) as writer:
        for step in (0, 20):
            bus.publish(Topic.METRICS, row(step, None if step == 0 else 0.25))
        bus.publish(Topic.SEED_EVENT, LOAD)
        bus.publish(Topic.SEED_EVENT, {"kind": "health", "step": 20, "layer": 0, "seed": 1})
        writer.flush()
        board = read_board(tmp_path)
        assert scalars(board, "loss/train") == [(20, 0.25)]
        assert dict(scalars(board, "loss/validation")) == pytest.approx({0: 0.6, 20: 0.6})
        assert scalars(board, "seeds/active") == [(0, 1.0), (20, 1.0)]
        assert scalars(board, "alpha/layer_0/seed_1") == [(0, 0.25), (20, 0.25)]
        health = dict(scalars(board, "health/layer_1/seed_0"))
        assert health == pytest.approx({0: 0.8, 20: 0.8})
        assert "health/layer_0/seed_0" not in board.Tags()["scalars"]
        assert scalars(board, "seconds/train") == [(0, 1.5), (20, 1.5)]
        assert texts(board) == [(20, "layer 0, seed 1: graft asked for (stuck)")]
    assert writer.lost == 0


def test_what_was_taken_back_is_gone_from_tensorboard(tmp_path):
    bus = InProcessBus()
    with TensorBoardWriter(tmp_path, bus) as writer:
        for step in (0, 20, 40, 60):
            bus.publish(Topic.METRICS, row(step, 1.0 + step))
        bus.publish(Topic.SEED_EVENT, BACK)
        bus.publish(Topic.METRICS, row(20, 0.5))
        writer.flush()
    assert scalars(read_board(tmp_path), "loss/train") == [(0, 1.0), (20, 0.5)]
    # A resumed run has a writer of its own.
    bus = InProcessBus()
    with TensorBoardWriter(tmp_path, bus):
        bus.publish(Topic.METRICS, row(20, 0.25))
    assert scalars(read_board(tmp_path), "loss/train") == [(0, 1.0), (20, 0.25)]
    assert len(list(tmp_path.iterdir())) == 2


def test_many_seeds_are_not_written_one_by_one(tmp_path):
    bus, wide = InProcessBus(), [[2] * (MOST_SEEDS + 1)]
    with TensorBoardWriter(tmp_path, bus):
        bus.publish(Topic.METRICS, row(0, stages=wide, alphas=wide, health=wide))
    tags = read_board(tmp_path).Tags()["scalars"]
    assert scalars(read_board(tmp_path), "seeds/active") == [(0, MOST_SEEDS + 1.0)]
    assert not [tag for tag in tags if tag.startswith(("alpha", "health"))]


def test_nothing_is_made_where_nothing_is_said(tmp_path):
    with TensorBoardWriter(tmp_path / "board", InProcessBus()) as writer:
        writer.flush()
    assert not (tmp_path / "board").exists()


def records(path: Path) -> int:
    """Whole records of an event file, each parsed; a torn one is an error."""
    data, at, count = path.read_bytes(), 0, 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        count += 1
    assert at == len(data)
    return count


def test_a_full_disk_loses_messages_and_stops_nothing(small_disk, caplog):
    place = small_disk(64)
    bus = InProcessBus()
    with TensorBoardWriter(place / "board", bus) as writer:
        bus.publish(Topic.METRICS, row(0))
        writer.flush()
        (place / "fill").write_bytes(b"x" * max(0, os.statvfs(place).f_bavail * 4096 - 4096))
        for step in range(20, 600, 20):
            bus.publish(Topic.METRICS, row(step))
        writer.flush()
        lost = writer.lost
        assert lost > 0
        (place / "fill").unlink()
        bus.publish(Topic.METRICS, row(600))
    assert writer.lost == lost
    last = sorted((place / "board").iterdir())[-1]
    assert records(last) >= 3
    assert f"{lost} messages were not written for TensorBoard to {place / 'board'}" in caplog.text
    assert os.strerror(errno.ENOSPC) in caplog.text


@pytest.mark.parametrize("bad", [{"step": None}, {"seconds": 5}, {"stages": 7}])
def test_a_message_that_makes_no_sense_is_lost_alone(tmp_path, bad):
    bus = InProcessBus()
    with TensorBoardWriter(tmp_path, bus) as writer:
        for one in (row(0), row(20) | bad, row(40)):
            bus.publish(Topic.METRICS, one)
            writer.flush()
    assert writer.lost == 1
    assert [step for step, _ in scalars(read_board(tmp_path), "loss/train")] == [0, 40]


def test_writing_for_tensorboard_needs_neither_torch_nor_tensorflow(tmp_path):
    script = """
import sys
from pathlib import Path
from esper.nissa import TensorBoardWriter
from esper.oona import InProcessBus, Topic
bus = InProcessBus()
with TensorBoardWriter(Path(sys.argv[1]), bus):
    bus.publish(Topic.METRICS, {"step": 0, "train_loss": 1.0})
print(sorted({"torch", "tensorflow", "fastapi", "starlette", "opentelemetry"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert scalars(read_board(tmp_path), "loss/train") == [(0, 1.0)]


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(InputError, match=r"pip install 'esper-morphogenetic\[tensorboard\]'"):
        TensorBoardWriter(tmp_path, InProcessBus())


# Prometheus


def samples(path: Path) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            labels = tuple(value for key, value in sorted(sample.labels.items()) if key != "run")
            assert sample.labels["run"] == "runs/a"
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_prometheus_reads_the_newest_measurement(tmp_path):
    bus, path = InProcessBus(), tmp_path / "esper.prom"
    with PrometheusWriter(path, bus, "runs/a") as writer:
        writer.flush()
        assert not path.exists()
        bus.publish(Topic.METRICS, row(0))
        bus.publish(Topic.SEED_EVENT, LOAD)
        bus.publish(Topic.SEED_EVENT, LOAD)
        bus.publish(Topic.METRICS, row(20, None))
        writer.flush()
        found = samples(path)
        assert found["esper_step"] == {(): 20.0}
        assert "esper_train_loss" not in found
        assert found["esper_test_accuracy"] == {(): 0.68}
        assert found["esper_flops_total"] == {(): 1e9}
        assert found["esper_spent_seconds_total"] == {("train",): 1.5, ("evaluate",): 0.5}
        assert found["esper_seed_stage"][("0", "1")] == 2.0
        assert found["esper_seed_alpha"][("0", "1")] == 0.25
        assert found["esper_seed_health"] == {("0", "1"): 0.9, ("1", "0"): 0.8}
        assert found["esper_events_total"] == {("load",): 2.0}
        assert found["esper_messages_lost_total"] == {(): 0.0}
    assert [found.name for found in tmp_path.iterdir()] == ["esper.prom"]


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    bus, path = InProcessBus(), tmp_path / "metrics" / "esper.prom"
    path.parent.mkdir()
    with PrometheusWriter(path, bus, "a") as writer:
        path.parent.rmdir()
        bus.publish(Topic.METRICS, row(0))
        writer.flush()
        bus.publish(Topic.METRICS, row(20))
        writer.flush()
        assert writer.lost == 2
        path.parent.mkdir()
        bus.publish(Topic.METRICS, row(40))
    assert writer.lost == 2
    assert 'esper_messages_lost_total{run="a"} 2.0' in path.read_text()
    assert f"2 measurements were not written for Prometheus to {path}: " in caplog.text


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("esper.txt", r"esper\.txt must end in \.prom: the textfile collector reads no other"),
        ("none/esper.prom", "there is no folder .*none; make it, or give another"),
    ],
)
def test_a_file_that_prometheus_would_not_read_is_refused(tmp_path, name, match):
    with pytest.raises(InputError, match=match):
        PrometheusWriter(tmp_path / name, InProcessBus(), "a")


# All together


def test_all_writers_of_a_run(tmp_path):
    bus, prometheus = InProcessBus(), tmp_path / "esper.prom"
    with make_writers(tmp_path, bus, tensorboard=True, prometheus=prometheus) as writers:
        bus.publish(Topic.METRICS, row(0))
        assert not (tmp_path / "tensorboard").exists()
        writers.flush()
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row(0)
        assert "esper_step" in prometheus.read_text()
        assert scalars(read_board(tmp_path / "tensorboard"), "loss/train") == [(0, 0.5)]
        bus.publish(Topic.METRICS, row(20))
    # What was not flushed is, at the end.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(scalars(read_board(tmp_path / "tensorboard"), "loss/train")) == 2
    assert writers.lost == 0


def test_the_record_alone_is_the_default(tmp_path):
    bus = InProcessBus()
    with make_writers(tmp_path, bus, tensorboard=False, prometheus=None) as writers:
        bus.publish(Topic.METRICS, row(0))
        writers.flush()
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_bad_input_leaves_nothing_behind(tmp_path):
    with (
        pytest.raises(InputError, match=r"must end in \.prom"),
        make_writers(tmp_path, InProcessBus(), tensorboard=True, prometheus=tmp_path / "a.txt"),
    ):
        raise AssertionError("it was made")
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_is_an_error_and_the_others_go_on(tmp_path):
    with (
        pytest.raises(OSError, match="No such file"),
        make_writers(tmp_path / "none", InProcessBus(), tensorboard=False, prometheus=None),
    ):
        raise AssertionError("it was made")

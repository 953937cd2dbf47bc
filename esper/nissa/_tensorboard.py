"""Measurements and decisions of a run for TensorBoard.

Written by TensorBoard's own package, which needs neither torch nor TensorFlow. What a run took
back, or makes again after it was resumed, TensorBoard forgets: it is told of the step.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from esper.errors import InputError
from esper.nissa._entries import DECISIONS, ROLLBACK, VETO, describe_entry, explain_entry
from esper.nissa._history import number
from esper.oona import Bus, Topic
from esper_functional import SeedLifecycleState

MOST_SEEDS = 64
"""With more seeds than these, alphas and health are not written for each by itself."""

_TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "test_loss": "loss/test",
    "validation_accuracy": "accuracy/validation",
    "test_accuracy": "accuracy/test",
    "parameters": "cost/parameters",
    "flops": "cost/flops",
    "compilations": "cost/compilations",
    "learning_rate": "learning_rate",
    "rollbacks": "rollbacks",
}


class TensorBoardWriter:
    """Writes a run's measurements as scalars, and its decisions as text.

    A context manager. A flush never raises: what could not be written is counted in `lost`, and
    told on closing.

    Args:
        folder: of the event files; it is made where it is not there.

    Raises:
        InputError: where TensorBoard's package is not installed.
    """

    def __init__(self, folder: Path, bus: Bus) -> None:
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise InputError(
                "writing for TensorBoard needs the package tensorboard, which cannot be imported"
                f" ({error}): pip install 'esper-morphogenetic[tensorboard]'"
            ) from error
        self.folder = folder
        self.lost = 0
        """Measurements and entries that could not be written."""
        self._proto: Any = event_pb2
        self._record_writer: Any = RecordWriter
        self._messages = bus.subscribe(Topic.METRICS, Topic.SEED_EVENT)
        self._file: BinaryIO | None = None
        self._records: Any = None
        self._failure = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        self._close()
        lost = self.lost + self._messages.dropped
        if lost:
            logging.getLogger("esper").warning(
                "%d messages were not written for TensorBoard to %s: %s",
                lost,
                self.folder,
                self._failure or "they came faster than they were written",
            )

    def flush(self) -> None:
        """Write what is waiting."""
        waiting = self._messages.drain()
        if not waiting:
            return
        written = 0
        try:
            for message in waiting:
                if message.topic is Topic.METRICS:
                    self._write_row(message.payload)
                else:
                    self._write_entry(message.payload)
                written += 1
            if self._file is not None:
                self._file.flush()
        except (OSError, ValueError, TypeError, KeyError) as error:
            # Behind half a record nothing could be read: what comes next has a file of its own.
            self._close()
            self.lost += len(waiting) - written
            self._failure = self._failure or str(error)

    def _close(self) -> None:
        file, self._file, self._records = self._file, None, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._failure = self._failure or str(error)

    def _write_row(self, row: Mapping[str, Any]) -> None:
        step = int(row["step"])
        if self._file is None:
            self._open(step)
        values = [self._value(tag, row.get(key)) for key, tag in _TAGS.items()]
        values += [
            self._value(f"seconds/{activity}", spent)
            for activity, spent in sorted(dict(row.get("seconds") or {}).items())
        ]
        stages = [stage for seeds in row.get("stages") or () for stage in seeds]
        for stage in SeedLifecycleState:
            values.append(self._value(f"seeds/{stage.name.lower()}", stages.count(int(stage))))
        if len(stages) <= MOST_SEEDS:
            for name, key in (("alpha", "alphas"), ("health", "health")):
                for layer, seeds in enumerate(row.get(key) or ()):
                    for seed, value in enumerate(seeds):
                        values.append(self._value(f"{name}/layer_{layer}/seed_{seed}", value))
        self._write(step, summary={"value": [value for value in values if value]})

    def _write_entry(self, entry: Mapping[str, Any]) -> None:
        kind, step = entry.get("kind"), int(entry["step"])
        if kind not in DECISIONS and kind not in (VETO, ROLLBACK):
            return
        if self._file is None:
            self._open(step)
        where = f"layer {entry['layer']}, seed {entry['seed']}: " if "layer" in entry else ""
        told = f"{where}{describe_entry(entry)}"
        reason = explain_entry(entry)
        self._write_text(step, f"{told} ({reason})" if reason else told)
        if kind == ROLLBACK:
            self._forget_from(int(entry["to"]))

    def _write_text(self, step: int, text: str) -> None:
        from tensorboard.plugins.text import metadata

        value = {
            "tag": "decisions",
            "metadata": metadata.create_summary_metadata("decisions", ""),
            "tensor": {
                "dtype": "DT_STRING",
                "tensor_shape": {"dim": [{"size": 1}]},
                "string_val": [text.encode("utf-8", "replace")],
            },
        }
        self._write(step, summary={"value": [value]})

    def _value(self, tag: str, value: object) -> dict[str, Any] | None:
        found = number(value)
        return None if found is None else {"tag": tag, "simple_value": found}

    def _open(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._fresh_file()
        self._records = self._record_writer(self._file)
        self._write(0, file_version="brain.Event:2")
        self._forget_from(step)

    def _fresh_file(self) -> BinaryIO:
        # Readers take the files of a folder by name: by time first, then by number.
        parts = ("events.out.tfevents", f"{int(time.time()):010d}", socket.gethostname())
        taken = 0
        while True:
            name = ".".join((*parts, str(os.getpid()), f"{taken:06d}"))
            try:
                return (self.folder / name).open("xb")
            except FileExistsError:
                taken += 1

    def _forget_from(self, step: int) -> None:
        self._write(step, session_log={"status": "START"})

    def _write(self, step: int, **what: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), step=step, **what)
        self._records.write(event.SerializeToString())

"""Measurements of a run, one JSON line for each decision boundary."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from esper.errors import EsperError
from esper.oona import Bus, Topic

MEASURED = (
    "step", "train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy",
    "stages", "alphas", "parameters", "compilations", "seconds",
)  # fmt: skip
"""The keys of a measurement."""

OF_THE_PROCESS = ("seconds", "compilations")
"""What measurements hold that is no function of the run."""


class MeasurementsDigest:
    """The SHA-256 of measurements, without what is of the process that made them.

    Args:
        rows: the first ones.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._hash = hashlib.sha256()
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in the next one."""
        kept = {key: value for key, value in row.items() if key not in OF_THE_PROCESS}
        self._hash.update(json.dumps(kept, sort_keys=True).encode() + b"\n")

    def __str__(self) -> str:
        return self._hash.hexdigest()


class MetricsWriter:
    """Writes what is published on `Topic.METRICS` to a file, whenever it is flushed.

    A context manager: the file is opened on entry.
    """

    def __init__(self, path: Path, bus: Bus) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._messages = bus.subscribe(Topic.METRICS)

    def __enter__(self) -> Self:
        self._file = self._path.open("a")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def flush(self) -> None:
        """Write what is waiting.

        Raises:
            OSError: where the disk does not take it.
        """
        if self._file is None:
            return
        for message in self._messages.drain():
            self._file.write(json.dumps(dict(message.payload), sort_keys=True) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The measurements of a run; a torn last line is passed over.

    Raises:
        EsperError: naming a line that cannot be parsed.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("it is no measurement")
            missing = [key for key in MEASURED if key not in row]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
        except ValueError as error:
            raise EsperError(
                f"{path} is damaged at line {number}: {error}. It decides nothing: remove the file"
                " to go on without the measurements made so far."
            ) from error
        rows.append(row)
    return rows


def keep_metrics_before(path: Path, step: int) -> None:
    """Drop the measurements of `step` and later, which a resumed run makes again."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] < step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))
    partial.replace(path)

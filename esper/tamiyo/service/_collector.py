"""Health on its way to a decision: what must pass is kept, of the rest there is a sample."""

import dataclasses
from collections.abc import Collection

import numpy as np

from esper.contracts import HealthSignal, HealthSignalBatch
from esper.tamiyo._check import require
from esper.tamiyo.service._rows import joined, merge, rows_of
from esper.tamiyo.service._sampling import hash_of, taken
from esper.tamiyo.service._spread import LEAST_COUNT, RunningSpread


@dataclasses.dataclass
class Outcomes:
    """What became of signals, counted.

    Each that was received is invalid, must pass, was sampled or was passed over: these four add up
    to `received`. `evicted` ones had been sampled; `merged` ones had to pass, and are counted in
    the row that they were merged into.
    """

    received: int = 0
    invalid: int = 0
    """Not finite or out of range, and left out."""
    must_pass: int = 0
    """With errors, ready for a transition, or anomalous."""
    sampled: int = 0
    """Normal ones that were taken."""
    passed_over: int = 0
    """Normal ones that were not."""
    evicted: int = 0
    """Normal ones that made room."""
    merged: int = 0
    """Rows that were merged into a newer one of their seed."""
    faulty: int = 0
    """With errors; of those that must pass, as the next two."""
    ready: int = 0
    anomalous: int = 0
    forgotten: int = 0
    """That waited for a model which never reported, and was forgotten."""


class HealthCollector:
    """A bounded buffer of health, in columns.

    Signals with errors, ready for a transition, or anomalous (see `RunningSpread`) always pass. Of
    the others a part is taken by a hash of model, layer, seed and step.

    Where the buffer is full, sampled normal signals go first, the oldest of them before others.
    Where all of it must pass, the oldest rows are merged into the next ones of their seeds: the
    newest state stays, and counts add up. So what must pass is never dropped: the sums of
    `passing`, `faulty`, `readies` and `anomalous` over all rows are what they were without a bound.
    It never holds more than `capacity` rows, or one for each seed about which something must be
    said, where those are more.

    Args:
        capacity: rows that are held, from 1.
        sample: the share of normal signals that is taken, in [0, 1].
        window: health scores of a model by which anomalies are judged.
        threshold: of their robust z-score.

    Raises:
        InputError: for values out of range.
    """

    def __init__(
        self,
        *,
        capacity: int = 65_536,
        sample: float = 0.1,
        window: int = 512,
        threshold: float = 3.5,
    ) -> None:
        require("capacity of a health collector", capacity, 1, whole=True)
        require("sample of a health collector", sample, 0, 1)
        require("window of a health collector", window, LEAST_COUNT, whole=True)
        require("threshold of a health collector", threshold, 1e-9)
        self.outcomes = Outcomes()
        self._capacity = capacity
        self._sample = sample
        self._window = window
        self._threshold = threshold
        self._numbers: dict[str, int] = {}
        self._next = 0
        self._hashes: dict[str, np.uint64] = {}
        self._spreads: dict[str, RunningSpread] = {}
        self._parts: list[np.ndarray] = []
        self._size = 0

    def __len__(self) -> int:
        """Rows that are held."""
        return self._size

    def admit(self, model: str, signals: HealthSignalBatch | HealthSignal) -> None:
        """Take in a batch of one model's signals, the oldest first.

        Raises:
            InputError: for columns that differ in length or hold no numbers; nothing is taken.
        """
        number = self._number(model)
        rows, invalid = rows_of(signals, number)
        outcomes = self.outcomes
        outcomes.received += len(rows) + invalid
        outcomes.invalid += invalid
        if not len(rows):
            return
        anomalous = self._spreads[model].judge(rows["health"])
        rows["anomalous"] = anomalous
        must = anomalous | (rows["errors"] > 0) | rows["ready"]
        rows["passing"] = must
        keep = must | taken(self._hashes[model], rows, self._sample)
        passing, kept = int(must.sum()), int(keep.sum())
        outcomes.must_pass += passing
        outcomes.sampled += kept - passing
        outcomes.passed_over += len(rows) - kept
        outcomes.faulty += int(rows["faulty"].sum())
        outcomes.ready += int(rows["readies"].sum())
        outcomes.anomalous += int(anomalous.sum())
        if kept:
            self._parts.append(rows[keep])
            self._size += kept
        if self._size > self._capacity:
            self._make_room()

    def pressing(self) -> set[str]:
        """The models about which something waits that must pass."""
        rows = self._rows()
        numbers = set(np.unique(rows["model"][rows["passing"] > 0]).tolist())
        return {name for name, number in self._numbers.items() if number in numbers}

    def drain(self, models: Collection[str]) -> dict[str, np.ndarray]:
        """Take out all rows of these models: `HEALTH` `[rows]` of each, one row for each seed.

        What is known of the others stays.
        """
        rows = self._rows()
        numbers = {self._numbers[name]: name for name in models if name in self._numbers}
        mine = np.isin(rows["model"], list(numbers))
        self._keep(rows[~mine])
        merged = merge(rows[mine])
        # Sorted once, and not looked through for each model.
        order = np.argsort(merged["model"], kind="stable")
        merged = merged[order]
        starts = np.searchsorted(merged["model"], list(numbers))
        ends = np.searchsorted(merged["model"], list(numbers), side="right")
        found = {
            name: merged[start:end]
            for name, start, end in zip(numbers.values(), starts, ends, strict=True)
        }
        return {name: found.get(name, merged[:0]) for name in models}

    def give_back(self, rows: np.ndarray) -> None:
        """Put rows back that were drained, before what came since."""
        if len(rows):
            self._parts.insert(0, rows)
            self._size += len(rows)
        if self._size > self._capacity:
            self._make_room()

    def forget(self, model: str) -> None:
        """Let go of all that is known of a model; what waits is counted as forgotten."""
        if model not in self._numbers:
            return
        rows = self._rows()
        mine = rows["model"] == self._numbers.pop(model)
        self.outcomes.forgotten += int(rows["signals"][mine].sum())
        self._keep(rows[~mine])
        del self._hashes[model], self._spreads[model]

    def _number(self, model: str) -> int:
        if model not in self._numbers:
            self._numbers[model] = self._next
            self._next += 1
            self._hashes[model] = hash_of(model)
            self._spreads[model] = RunningSpread(self._window, self._threshold)
        return self._numbers[model]

    def _rows(self) -> np.ndarray:
        if len(self._parts) != 1:
            self._parts = [joined(self._parts)]
        return self._parts[0]

    def _keep(self, rows: np.ndarray) -> None:
        self._parts = [rows] if len(rows) else []
        self._size = len(rows)

    def _make_room(self) -> None:
        rows = self._rows()
        # More than is needed now, so that a full buffer is not looked through with each batch.
        surplus = len(rows) - self._capacity + self._capacity // 8
        normal = np.flatnonzero(rows["passing"] == 0)[:surplus]
        self.outcomes.evicted += len(normal)
        rows = np.delete(rows, normal)
        if len(rows) > self._capacity:
            merged = merge(rows, surplus - len(normal))
            self.outcomes.merged += len(rows) - len(merged)
            rows = merged
        self._keep(rows)

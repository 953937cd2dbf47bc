"""A run as read back from its folder, for reports."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from esper.nissa._entries import MARK, NO_EVENTS, kept_rows, standing
from esper.nissa._metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run left behind."""

    path: Path
    config: dict[str, Any]
    """As in `run.json`."""
    metrics: list[dict[str, Any]]
    """One for each decision boundary, by step; those that the run took back are left out."""
    events: list[dict[str, Any]]
    """The ledger's entries without marks, in order: all that happened, vetoes, rollbacks and
    measured worths too; read, not verified (see `esper replay`)."""
    regions: dict[str, np.ndarray]
    """`before` and `after`: probability of class 1 over the square of ±1.1; may be empty."""
    undone: frozenset[int] = frozenset()
    """Which of `events`, by place, a rollback took back."""

    @property
    def standing(self) -> list[dict[str, Any]]:
        """The events of seeds that were not taken back: what the state is a fold of."""
        return [
            entry
            for i, entry in enumerate(self.events)
            if i not in self.undone and entry["kind"] not in NO_EVENTS
        ]

    @property
    def accuracy(self) -> float:
        """Accuracy on the test part at the end, in [0, 1]."""
        return float(self.metrics[-1]["test_accuracy"])


def read_run(path: Path) -> RunRecord:
    """Read a run's folder."""
    events = path / "events.jsonl"
    lines = events.read_bytes().split(b"\n")[:-1] if events.exists() else []
    entries = [json.loads(line)["entry"] for line in lines]
    regions = path / "regions.npz"
    grids: dict[str, np.ndarray] = {}
    if regions.exists():
        with np.load(regions, allow_pickle=False) as stored:
            grids = {name: stored[name] for name in stored.files}
    holds = standing(entries)
    places = [i for i, entry in enumerate(entries) if entry["kind"] != MARK]
    return RunRecord(
        path=path,
        config=json.loads((path / "run.json").read_bytes())["config"],
        metrics=kept_rows(read_metrics(path / "metrics.jsonl")),
        events=[entries[i] for i in places],
        regions=grids,
        undone=frozenset(at for at, i in enumerate(places) if not holds[i]),
    )

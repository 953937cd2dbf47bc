"""A run as read back from its folder, for reports."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from esper.nissa._metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run left behind."""

    path: Path
    config: dict[str, Any]
    """As in `run.json`."""
    metrics: list[dict[str, Any]]
    """One for each decision boundary, by step."""
    events: list[dict[str, Any]]
    """The ledger's entries without marks; read, not verified (see `esper replay`)."""
    regions: dict[str, np.ndarray]
    """`before` and `after`: probability of class 1 over the square of ±1.1; may be empty."""

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
    return RunRecord(
        path=path,
        config=json.loads((path / "run.json").read_bytes())["config"],
        metrics=read_metrics(path / "metrics.jsonl"),
        events=[entry for entry in entries if entry["kind"] != "mark"],
        regions=grids,
    )

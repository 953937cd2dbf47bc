"""Health signals as rows of one array: no object of Python for each of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esper.contracts import HealthSignal, HealthSignalBatch
from esper.errors import InputError

HEALTH = np.dtype(
    [
        ("model", np.int64),
        ("layer", np.int64),
        ("seed", np.int64),
        ("step", np.int64),
        ("epoch", np.int64),
        ("errors", np.int64),
        ("variance", np.float64),
        ("dead_ratio", np.float64),
        ("correlation", np.float64),
        ("health", np.float64),
        ("stage", np.uint8),
        ("ready", np.bool_),
        ("signals", np.int64),
        ("passing", np.int64),
        ("faulty", np.int64),
        ("readies", np.int64),
        ("anomalous", np.int64),
        ("most_errors", np.int64),
        ("least_health", np.float64),
    ]
)
"""A row of health. Down to `ready` it is what the newest signal of it says; then come how many
signals it stands for; how many of those had to pass, told of errors, were ready for a transition
and were anomalous; and the most errors and the least health that any of them had."""

COUNTED = ("signals", "passing", "faulty", "readies", "anomalous")
"""What adds up where rows are merged."""

_LARGEST = (1 << 63) - 1024
"""The largest whole number of 64 bits that is one as a float too."""
_COLUMNS = {
    "layer": ("layer_id", 0, _LARGEST),
    "seed": ("seed_id", 0, _LARGEST),
    "step": ("step", 0, _LARGEST),
    "epoch": ("epoch", 0, _LARGEST),
    "errors": ("error_count", 0, _LARGEST),
    "variance": ("activation_variance", 0.0, np.inf),
    "dead_ratio": ("dead_neuron_ratio", 0.0, 1.0),
    "correlation": ("avg_correlation", -1.0, 1.0),
    "health": ("health_score", 0.0, 1.0),
    "stage": ("stage", 0, 4),
    "ready": ("is_ready_for_transition", 0, 1),
}
"""The columns of a batch, and between what they lie."""


def rows_of(signals: HealthSignalBatch | HealthSignal, model: int) -> tuple[np.ndarray, int]:
    """The rows of a batch, and how many of its signals were left out.

    What came over a bus was checked there. A batch that was made in this process may have been
    made without a check, as a training loop does: what is not finite or out of range is left out.

    Args:
        model: the number that its rows are known by.

    Returns:
        `HEALTH` `[rows]`, in the batch's order, and the count of those that are not in it.

    Raises:
        InputError: for columns that differ in length or hold no numbers.
    """
    if isinstance(signals, HealthSignal):
        columns = {name: [getattr(signals, own)] for name, (own, _, _) in _COLUMNS.items()}
    else:
        columns = {name: getattr(signals, own) for name, (own, _, _) in _COLUMNS.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    count = lengths["layer"]
    if set(lengths.values()) != {count}:
        raise InputError(f"the columns of a batch of health signals differ in length: {lengths}")
    rows = np.zeros(count, HEALTH)
    fine = np.ones(count, np.bool_)
    for name, column in columns.items():
        own, least, most = _COLUMNS[name]
        values = _numbers(own, column)
        good = np.isfinite(values) & (values >= least) & (values <= most)
        if isinstance(least, int) and values.dtype.kind == "f":
            good &= values == np.floor(values)
        fine &= good
        rows[name] = np.where(good, values, 0)
    rows["model"] = model
    rows["signals"] = 1
    rows["faulty"] = rows["errors"] > 0
    rows["readies"] = rows["ready"]
    rows["most_errors"] = rows["errors"]
    rows["least_health"] = rows["health"]
    return rows[fine], int(count - fine.sum())


def _numbers(name: str, column: Any) -> np.ndarray:
    try:
        values = np.asarray(column)
        if values.dtype.kind in "biuf" and values.ndim == 1:
            return values
        values = np.asarray(column, np.float64)
        if values.ndim == 1:
            return values
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(
        f"column {name} of a batch of health signals holds numbers, one for each signal; got"
        f" {str(column)[:80]}"
    )


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows after rows.

    As bytes: numpy finds out the common type of the fields with each array, at 40 µs.
    """
    raw = np.dtype((np.void, HEALTH.itemsize))
    if not parts:
        return np.zeros(0, HEALTH)
    return np.concatenate([part.view(raw) for part in parts]).view(HEALTH)


def merge(rows: np.ndarray, most: int | None = None) -> np.ndarray:
    """Merge rows of one seed: the newest says how it is, and counts add up.

    Each row that goes is merged into the next one of its seed, so that no signal is lost that a
    row stands for.

    Args:
        rows: `HEALTH`, the oldest first.
        most: how many are to go at most, the oldest first; None for all but one of each seed.

    Returns:
        `HEALTH`, the oldest first, each where its newest signal was.
    """
    if len(rows) < 2:
        return rows
    order = np.lexsort((np.arange(len(rows)), rows["seed"], rows["layer"], rows["model"]))
    inside = rows[order]
    follows = np.zeros(len(rows), np.bool_)
    follows[:-1] = (
        (inside["model"][1:] == inside["model"][:-1])
        & (inside["layer"][1:] == inside["layer"][:-1])
        & (inside["seed"][1:] == inside["seed"][:-1])
    )
    goes = follows
    if most is not None and most < follows.sum():
        goes = np.zeros(len(rows), np.bool_)
        oldest = np.sort(order[follows])[:most]
        goes[order.argsort()[oldest]] = True
    if not goes.any():
        return rows
    stays = np.flatnonzero(~goes)
    firsts = np.concatenate([[0], stays[:-1] + 1])
    merged = inside[stays]
    for name in COUNTED:
        merged[name] = np.add.reduceat(inside[name], firsts)
    merged["most_errors"] = np.maximum.reduceat(inside["most_errors"], firsts)
    merged["least_health"] = np.minimum.reduceat(inside["least_health"], firsts)
    return merged[np.argsort(order[stays])]

"""What a page is told of a run: all of it at first, and then what has changed.

Each page has a cursor of its own, so one that is slow gets fewer and larger messages, and none
waits for another.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esper.nissa._history import BANDED, SCALARS, Point, Seeds
from esper.nissa._run_files import State
from esper.nissa._watched import WatchedRun

_GRIDS = ("stages", "alphas", "health")


@dataclasses.dataclass
class Cursor:
    """What one page has been told of a run."""

    epoch: int = -1
    version: int = -1
    generation: int = -1
    points: int = 0
    rows: int = 0
    entries: int = 0
    """Counted from the ledger's first, whether still at hand or not."""
    problems: int = -1
    kernels: Mapping[tuple[int, int], Any] | None = None
    worths: Mapping[tuple[int, int], Any] | None = None
    seeds: Seeds | None = None
    state: State | None = None


def message(run: WatchedRun, cursor: Cursor, state: State) -> dict[str, Any]:
    """What a page does not know yet, as JSON can say it; the cursor is brought up to date.

    The first message of an epoch has `head`; it replaces all that was told before.
    """
    told: dict[str, Any] = {"state": state.value, "idle": _rounded(run.idle)}
    if cursor.epoch != run.epoch:
        _reset(cursor, run.epoch)
        told["head"] = head(run)
    history = run.history
    if cursor.generation != history.generation or cursor.rows != history.rows:
        same = cursor.generation == history.generation
        # The last point that was sent may have taken in more measurements since.
        start = max(0, cursor.points - 1) if same else 0
        told["series"] = series(history.points, start) | {
            "each": history.each,
            "rows": history.rows,
        }
        told["now"] = _scalars(run.last) | {"speed": _speed(history.points)}
        if history.points:
            seeds = history.points[-1].seeds
            told["grid"] = _changes(cursor.seeds, seeds)
            cursor.seeds = seeds
        cursor.generation, cursor.rows = history.generation, history.rows
        cursor.points = len(history.points)
    count = run.forgotten + len(run.entries)
    if count != cursor.entries:
        start = max(cursor.entries - run.forgotten, 0)
        told["entries"] = {
            "from": run.forgotten + start,
            "forgotten": run.forgotten,
            "list": [entry.data for entry in run.entries[start:]],
        }
        cursor.entries = count
    for key, known, now in (
        ("kernels", cursor.kernels, run.kernels),
        ("worths", cursor.worths, run.worths),
    ):
        if known != now:
            told[key] = _places(known or {}, now)
            setattr(cursor, key, dict(now))
    if cursor.problems != len(run.problems):
        told["problems"] = [dataclasses.asdict(problem) for problem in run.problems]
        cursor.problems = len(run.problems)
    cursor.version, cursor.state = run.version, state
    return told


def head(run: WatchedRun) -> dict[str, Any]:
    """What does not change while a run goes on."""
    about = run.description
    return {
        "name": run.name,
        "path": str(run.path),
        "label": about.label,
        "task": about.task,
        "steps": about.steps,
        "sites": list(about.sites),
        "config": _plain(about.config),
        "versions": about.versions,
    }


def series(points: Sequence[Point], start: int) -> dict[str, Any]:
    """Points from `start` on, a list for each scalar; those of bands where they differ."""
    chosen = points[start:]
    told: dict[str, Any] = {"from": start, "step": [point.step for point in chosen]}
    for key in SCALARS:
        told[key] = [_rounded(point.values[key]) for point in chosen]
    for key in BANDED:
        told[key + "_low"] = [_rounded(point.low[key]) for point in chosen]
        told[key + "_high"] = [_rounded(point.high[key]) for point in chosen]
    return told


def seed_history(points: Sequence[Point], layer: int, seed: int) -> dict[str, Any]:
    """Stage, alpha and health of one seed over the points; None where a point has no such seed."""
    inside = [
        point.seeds if layer < point.seeds.shape[0] and seed < point.seeds.shape[1] else None
        for point in points
    ]
    return {
        "step": [point.step for point in points],
        "stages": [None if s is None else int(s.stages[layer, seed]) for s in inside],
        "alphas": [None if s is None else _rounded(s.alphas[layer, seed]) for s in inside],
        "health": [None if s is None else _rounded(s.health[layer, seed]) for s in inside],
    }


def _reset(cursor: Cursor, epoch: int) -> None:
    for field in dataclasses.fields(Cursor):
        setattr(cursor, field.name, field.default)
    cursor.epoch = epoch


def _changes(before: Seeds | None, seeds: Seeds) -> dict[str, Any]:
    """The seeds that changed, by their place in reading order; all of them where few did not."""
    now = [getattr(seeds, name).reshape(-1) for name in _GRIDS]
    told: dict[str, Any] = {"shape": list(seeds.shape), "at": None}
    if before is not None and before.shape == seeds.shape:
        changed = np.zeros(seeds.stages.size, np.bool_)
        for name, grid in zip(_GRIDS, now, strict=True):
            old = getattr(before, name).reshape(-1)
            changed |= (grid != old) & ~((grid != grid) & (old != old))  # NaN is NaN still
        if 2 * changed.sum() < changed.size:
            told["at"] = np.flatnonzero(changed).tolist()
            now = [grid[changed] for grid in now]
    stages, alphas, health = now
    told["stages"] = "".join(map(_digit, stages.tolist()))
    told["alphas"] = [_rounded(value) for value in alphas.tolist()]
    told["health"] = [_rounded(value) for value in health.tolist()]
    return told


def _places(
    known: Mapping[tuple[int, int], Any], now: Mapping[tuple[int, int], Any]
) -> list[list[Any]]:
    """What seeds have that have something else now; None for those that have nothing any more."""
    fresh = [[*place, *_plain(list(has))] for place, has in now.items() if known.get(place) != has]
    return fresh + [[*place, None] for place in known if place not in now]


def _digit(stage: int) -> str:
    return str(stage) if stage <= 9 else "?"


def _speed(points: Sequence[Point]) -> float | None:
    return _rounded(points[-1].values["speed"]) if points else None


def _scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in row.items() if key not in _GRIDS}


def _rounded(value: Any) -> Any:
    """A number with six digits, which is more than a page can show; None for none."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{float(value):.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _plain(value: Any) -> Any:
    """A value of a file without what JSON cannot say again."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value

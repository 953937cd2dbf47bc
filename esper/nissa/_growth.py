"""What the events of a run tell of its seeds: their stages and alphas over time."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from esper.nissa._entries import UNTOLD
from esper.nissa._figures import SeedHistory
from esper.nissa._record import RunRecord
from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    SeedLifecycleState,
    SeedState,
    advance,
    apply_event,
    init_seeds,
    running,
)


@dataclasses.dataclass(frozen=True)
class Growth:
    """What the events of a run tell of its seeds."""

    histories: tuple[SeedHistory, ...]
    """Of the seeds that ever left DORMANT."""
    kept: int
    """Kernels that run at the end."""
    removed: int
    """Kernels asked for that do not."""
    grew: bool
    """Whether a seed changed after step 0."""
    trouble: str = ""
    """Why nothing is told, where the events contradict each other."""


def read_growth(run: RunRecord) -> Growth:
    """Fold the events of each seed, to see its stage and alpha between them."""
    moves = [entry for entry in run.standing if entry["kind"] not in UNTOLD]
    last = [int(row["step"]) for row in (*run.metrics[-1:], *run.standing[-1:])]
    by_seed: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for entry in moves:
        by_seed.setdefault((entry["layer"], entry["seed"]), []).append(entry)
    try:
        folded = [
            _fold(*at, by_seed[at], max(last, default=0), run.metrics) for at in sorted(by_seed)
        ]
    except (KasminaException, ValueError) as error:
        trouble = f"its events cannot be told as a history ({error}); see esper replay."
        return Growth((), 0, 0, grew=False, trouble=trouble)
    kept = sum(bool(running(state)[0, 0]) for _, state in folded)
    waiting = sum(bool(state.stage[0, 0] == SeedLifecycleState.LOADING) for _, state in folded)
    asked = sum(entry["kind"] == EventKind.LOAD for entry in moves)
    return Growth(
        histories=tuple(history for history, _ in folded),
        kept=kept,
        removed=asked - kept - waiting,
        grew=any(entry["step"] > 0 for entry in moves),
    )


def _fold(
    layer: int,
    seed: int,
    entries: Sequence[Mapping[str, Any]],
    end: int,
    metrics: Sequence[Mapping[str, Any]],
) -> tuple[SeedHistory, SeedState]:
    """The history of one seed until `end`, and its state then."""
    state = init_seeds(1, 1)
    stages = [(0, SeedLifecycleState.DORMANT)]
    corners: list[tuple[int, float]] = []
    for entry in entries:
        step, kind = int(entry["step"]), EventKind(entry["kind"])
        state, passed = _advance(state, step)
        shape = entry.get("shape", "linear")
        event = Event(step, 0, 0, kind, entry["kernel"], entry["value"], entry["span"], shape)
        state = apply_event(state, event)
        corners += [*passed, _corner(state, step)]
        stage = SeedLifecycleState(int(state.stage[0, 0]))
        if stage is not stages[-1][1]:
            stages.append((step, stage))
    state, passed = _advance(state, end)
    corners += passed
    spans = [
        (first, then, stage)
        for (first, stage), (then, _) in pairwise([*stages, (end, stages[-1][1])])
        if first < then
    ]
    if any(entry.get("shape", "linear") != "linear" for entry in entries):
        # Between its ends such a ramp has no corners: it is drawn through what was measured.
        corners = _measured(layer, seed, metrics, spans)
    return SeedHistory(layer, seed, tuple(spans), tuple(corners)), state


def _measured(
    layer: int,
    seed: int,
    metrics: Sequence[Mapping[str, Any]],
    spans: Sequence[tuple[int, int, SeedLifecycleState]],
) -> list[tuple[int, float]]:
    """Alpha at each measurement while a kernel runs; NaN where none does."""
    runs = [span for span in spans if span[2] in _RUNNING]
    corners: list[tuple[int, float]] = []
    for row in metrics:
        step = int(row["step"])
        inside = any(first <= step <= then for first, then, _ in runs)
        alpha = row["alphas"][layer][seed] if inside else math.nan
        corners.append((step, float(alpha)))
    return corners


_RUNNING = (SeedLifecycleState.ACTIVE, SeedLifecycleState.FOSSILIZED)


def _advance(state: SeedState, step: int) -> tuple[SeedState, list[tuple[int, float]]]:
    """The state at `step`, and the corners of alpha on the way there."""
    corners: list[tuple[int, float]] = []
    ramp_end = int(state.ramp_start[0, 0] + state.ramp_span[0, 0])
    if state.ramp_span[0, 0] > 0 and ramp_end < step:
        state = advance(state, ramp_end)
        corners.append(_corner(state, ramp_end))
    state = advance(state, step)
    return state, [*corners, _corner(state, step)]


def _corner(state: SeedState, step: int) -> tuple[int, float]:
    return step, float(state.alpha[0, 0]) if running(state)[0, 0] else math.nan

"""What keeping the seeds' state costs: `python -m experiments.bench.state`.

One step of the state of all seeds (ramps advanced, the step's faults recorded,
health observed) as one function, on numpy and jitted on jax, against the same
arithmetic written by hand for this one purpose.
"""

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_functional import (
    EMA_FACTOR,
    FAILURES_TO_RECOVERY,
    SeedLifecycleState,
    SeedState,
    advance,
    init_seeds,
    observe_health,
    record_faults,
)
from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Call, Sampling, contest, starting_with
from experiments.bench._results import Check, Figure, Results
from experiments.bench._steps import fresh

ACTIVE, RECOVERY, FOSSIL = (
    np.uint8(stage)
    for stage in (
        SeedLifecycleState.ACTIVE,
        SeedLifecycleState.ERROR_RECOVERY,
        SeedLifecycleState.FOSSILIZED,
    )
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets of the design (§8)."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seeds: tuple[int, ...] = (4, 1_000, 100_000)
    seeds_per_layer: int = 4
    target_at: int = 1_000
    target_microseconds: float = 60.0
    target_bytes: float = 100.0
    seed: int = 0


Observation = tuple[Any, Any, Any]
"""Which seeds failed, which were sampled, and their health scores."""


def state_step(state: SeedState, seen: Observation, step: Any) -> SeedState:
    """What a training loop does to the state of all seeds, at most, in one step."""
    faults, sampled, scores = seen
    state = advance(state, step)
    state = record_faults(state, faults, step=step)
    return observe_health(state, sampled, scores, step=step)


def hand_step(xp: ModuleType, s: Mapping[str, Any], seen: Observation, step: Any) -> Any:
    """The same, on arrays by name, for this combination alone."""
    faults, sampled, scores = seen
    zero_i, zero_f = xp.int32(0), xp.float32(0.0)
    ramping = s["ramp_span"] > 0
    elapsed = step - s["ramp_start"]
    done = ramping & (elapsed >= s["ramp_span"])
    span = xp.where(ramping, s["ramp_span"], xp.int32(1))
    past = xp.clip(elapsed, 0, span).astype(xp.float32)
    between = s["ramp_from"] + (s["ramp_to"] - s["ramp_from"]) * past / span.astype(xp.float32)
    runs = ((s["stage"] == ACTIVE) | ((s["stage"] == FOSSIL) & (s["slot"] >= 0))) & ~s["fallback"]
    counted = xp.where(faults, s["error_count"] + 1, zero_i)
    changed = runs & (counted != s["error_count"])
    failed = changed & (counted >= FAILURES_TO_RECOVERY)
    recovers = failed & (s["stage"] == ACTIVE)
    ended = done | recovers
    observed = sampled & xp.isfinite(scores) & runs & ~failed
    moved = xp.where(observed, xp.float32(EMA_FACTOR) * (scores - s["health"]), zero_f)
    averaged = s["health"] + moved
    first = xp.where(xp.isnan(s["health"]), scores, averaged)
    updated = xp.where(done, s["ramp_start"] + span, s["last_update"])
    return {
        **s,
        "stage": xp.where(recovers, RECOVERY, s["stage"]),
        "alpha": xp.where(ramping, xp.where(done, s["ramp_to"], between), s["alpha"]),
        "ramp_from": xp.where(ended, zero_f, s["ramp_from"]),
        "ramp_to": xp.where(ended, zero_f, s["ramp_to"]),
        "ramp_start": xp.where(ended, zero_i, s["ramp_start"]),
        "ramp_span": xp.where(ended, zero_i, s["ramp_span"]),
        "error_count": xp.where(changed, counted, s["error_count"]),
        "fallback": s["fallback"] | failed,
        "incubating": s["incubating"] & ~recovers,
        "health": xp.where(observed, first, s["health"]),
        "last_update": xp.where(changed | observed, step, updated),
    }


def by_name(state: SeedState) -> dict[str, Any]:
    """The state's arrays by name."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def random_state(seeds: int, per_layer: int, seed: int) -> tuple[SeedState, Observation]:
    """Seeds in all stages, ramps before, in and past their spans, and what one step saw."""
    random = np.random.default_rng(seed)
    state = init_seeds(seeds // per_layer, per_layer)
    shape = state.shape
    stage = random.integers(0, len(SeedLifecycleState), shape).astype(np.uint8)
    active = stage == ACTIVE
    ramping = active & (random.random(shape) < 0.5)
    state = state.replace(
        stage=stage,
        slot=np.where(stage == 0, state.slot, 0).astype(np.int32),
        alpha=np.where(active, random.random(shape), 0.0).astype(np.float32),
        ramp_to=np.where(ramping, 1.0, 0.0).astype(np.float32),
        ramp_start=np.where(ramping, random.integers(0, 100, shape), 0).astype(np.int32),
        ramp_span=np.where(ramping, random.integers(1, 100, shape), 0).astype(np.int32),
        error_count=np.where(active, random.integers(0, 3, shape), 0).astype(np.int32),
        health=np.where(random.random(shape) < 0.5, random.random(shape), np.nan).astype(
            np.float32
        ),
    )
    faults, sampled = random.random((2, *shape)) < 0.1
    scores = random.random(shape).astype(np.float32)
    return state, (faults, sampled, scores)


def compare_states(results: Results, settings: Settings, seeds: int) -> None:
    """One number of seeds, on numpy and on jax."""
    state, seen = random_state(seeds, settings.seeds_per_layer, settings.seed)
    named, now = by_name(state), np.asarray(100, np.int32)
    on_jax = jax.tree.map(jnp.asarray, (state, seen, now))
    named_on_jax = (jax.tree.map(jnp.asarray, named), *on_jax[1:])

    def build_numpy() -> Mapping[str, Call]:
        twins = {twin: partial(hand_step, np, named, seen, now) for twin in ("by hand", "again")}
        return {**twins, "state functions": partial(state_step, state, seen, now)}

    def build_jax() -> Mapping[str, Call]:
        hand = partial(hand_step, jnp)
        twins = {twin: partial(fresh(hand), *named_on_jax) for twin in ("by hand", "again")}
        return {**twins, "state functions": partial(fresh(state_step), *on_jax)}

    for where, build in {"numpy": build_numpy, "jax, jitted": build_jax}.items():
        name = f"{seeds:,} seeds, {where}"
        if not results.wants(name):
            continue
        calls = build()
        found: Any = calls["state functions"]()
        apart = apart_from(found, calls["by hand"]())
        results.checks.append(Check(f"{name}: arrays unlike those by hand", "none", apart))
        (row,) = contest(
            name, {"state functions": None}, starting_with(calls, build),
            settings.sampling, jax.block_until_ready,
        )  # fmt: skip
        results.rows.append(row)
        target = settings.target_microseconds if seeds == settings.target_at else None
        results.figures.append(Figure(name, row.candidate.microseconds, "µs", target))


def apart_from(state: SeedState, expected: Any) -> str:
    """Names of the arrays that differ, beyond the last bits of a sum."""
    apart = [
        name
        for name, array in by_name(state).items()
        if not np.allclose(array, expected[name], rtol=1e-6, atol=1e-7, equal_nan=True)
        or np.asarray(array).dtype != np.asarray(expected[name]).dtype
    ]
    return ", ".join(apart) if apart else "none"


def measure(settings: Settings, only: str = "") -> Results:
    """All numbers of seeds, and the size of one."""
    results = Results(only=only)
    if results.wants("a seed"):
        one = sum(np.asarray(array).nbytes for array in by_name(init_seeds(1, 1)).values())
        results.figures.append(Figure("a seed", float(one), "bytes", settings.target_bytes))
        many = sum(np.asarray(array).nbytes for array in by_name(init_seeds(250, 4)).values())
        results.checks.append(Check("bytes of 1,000 seeds", str(1000 * one), str(many)))
    for seeds in settings.seeds:
        compare_states(results, settings, seeds)
    return results


BENCHMARK = Benchmark(
    name="state",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="The state step: median of paired ratios (interquartile range)",
    names=("by hand", "ours"),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

"""The executor's benchmark runs, and its variants agree; no time is looked at."""

import math

from experiments.bench._paired import Sampling
from experiments.bench.executor import Settings, measure

TINY = Sampling(rounds=2, builds=1, sample=1e-6, warmup=0, budget=0.01, least=1)
SETTINGS = Settings(sampling=TINY, sizes=((4, 2),), width=2, loads=1, compiled=False)


def test_it_runs_and_its_variants_agree():
    results = measure(SETTINGS)
    assert len(results.checks) == 10
    assert all(check.met for check in results.checks), results.checks
    assert [(row.name, row.variant) for row in results.rows] == [
        ("torch 4, batch 2: execute_kernel", "execute_kernel"),
        ("torch 4, batch 2: programs", "TorchScript"),
        ("jax 4, batch 2: execute_kernel", "execute_kernel"),
        ("jax 4, batch 2: programs", "StableHLO"),
        ("jax 4, batch 2: programs, with gradients", "StableHLO"),
    ]
    assert all(row.candidate.microseconds > 0 for row in results.rows)
    assert len(results.figures) == 7
    assert all(math.isfinite(figure.value) for figure in results.figures)


def test_what_nobody_asked_for_is_not_measured():
    results = measure(SETTINGS, "zzz")
    assert results.nothing_wanted
    assert len(results.offered) == 12

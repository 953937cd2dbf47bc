"""The policy's benchmark runs, and torch-geometric finds what ours finds; no time is looked at."""

import importlib.util
import math

import pytest

from experiments.bench._paired import Sampling
from experiments.bench.policy import Settings, measure

TINY = Sampling(rounds=1, builds=1, sample=1e-6, warmup=0, budget=0.01, least=1)
SETTINGS = Settings(
    sampling=TINY, sites=(5,), seeds=2, kernels=3, width=8, rounds=2, heads=2, target_sites=5
)
HAS_PEER = importlib.util.find_spec("torch_geometric") is not None


def test_it_measures_what_it_says():
    results = measure(SETTINGS)
    assert [figure.name for figure in results.figures] == [
        f"5 sites: {what}, {which}"
        for what in ("forward", "features", "decision")
        for which in ("p50", "p95")
    ]
    assert [figure.target for figure in results.figures] == [2.5, None, 1.0, None, 4.24, 10.0]
    assert all(figure.value > 0 and math.isfinite(figure.value) for figure in results.figures)
    if not HAS_PEER:
        assert not results.rows
        (note,) = results.notes
        assert "No comparison with torch-geometric" in note


@pytest.mark.skipif(not HAS_PEER, reason="torch-geometric is not installed")
def test_torch_geometric_finds_the_same():
    results = measure(SETTINGS, "forward")
    assert len(results.checks) == 2
    assert all(check.met for check in results.checks), results.checks
    assert [(row.name, row.target) for row in results.rows] == [("5 sites: forward", 0.2)]


def test_what_nobody_asked_for_is_not_measured():
    results = measure(SETTINGS, "zzz")
    assert results.nothing_wanted
    assert results.offered == [f"5 sites: {what}" for what in ("forward", "features", "decision")]

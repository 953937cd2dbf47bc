"""The benchmark of seeds trains the same steps in every way; no time is looked at."""

from experiments.bench._paired import Sampling
from experiments.bench._results import Results
from experiments.bench.seeds import WAYS, Settings, compare_seeds

TINY = Sampling(rounds=2, builds=1, sample=1e-6, warmup=1, budget=0.01, least=2)


def test_every_way_trains_the_same_steps():
    results = Results()
    settings = Settings(sampling=TINY, seeds=3, steps=4)
    for task in ("spirals", "digits"):
        compare_seeds(results, settings, task)
    assert [row.variant for row in results.rows] == [*WAYS, *WAYS]
    assert len(results.checks) == 4
    assert all(check.met for check in results.checks), results.checks

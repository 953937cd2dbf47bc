"""The benchmark of misses runs, and none knows what another found out; no time is looked at."""

from esper.cache import _metadata
from experiments.bench._paired import Sampling
from experiments.bench._results import Results
from experiments.bench.cache import Settings, measure_misses

TINY = Sampling(rounds=2, builds=1, sample=1e-6, warmup=1, budget=0.01, least=2)


def test_each_miss_finds_out_what_the_kernel_is(tmp_path, artifact):
    results = Results(only="miss")
    measure_misses(results, Settings(sampling=TINY), artifact, tmp_path)
    assert len(results.checks) == len(results.rows) == len(results.figures) == 3
    assert all(check.met for check in results.checks), results.checks
    for remembered in (_metadata._flops, _metadata._platforms):
        assert remembered.cache_info()[:2] == (0, 1)

"""The benchmark of the service feeds what it counts; no time is looked at."""

from esper.oona import MemoryBroker
from experiments.bench._results import Results
from experiments.bench.tamiyo_service import Settings, measure_policy, measure_service


def test_all_that_is_sent_comes_and_nothing_that_must_pass_is_lost():
    results = Results()
    settings = Settings(rate=2_000, models=5, longest=0.5)
    with MemoryBroker() as broker:
        measure_service(results, settings, "memory", broker, "pipe")
    assert len(results.checks) == 3
    assert all(check.met for check in results.checks), results.checks
    assert {figure.name for figure in results.figures} >= {"memory: collection p95", "memory: CPU"}


def test_a_policy_is_timed():
    results = Results()
    measure_policy(results, Settings(reporting=(1,), decisions=1, width=8))
    assert all(check.met for check in results.checks), results.checks
    assert len(results.figures) == 4

"""The benchmark of the buses carries all that it times; no time is looked at."""

import pytest

from esper.oona import MemoryBroker, SqliteBroker
from experiments.bench._paired import Sampling
from experiments.bench._results import Results
from experiments.bench.bus import Settings, measure_bus, measure_telemetry, measure_training

TINY = Sampling(rounds=2, builds=1, sample=1e-6, warmup=1, budget=0.01, least=2)


@pytest.mark.parametrize("name", ["memory", "file"])
def test_what_is_published_comes(name, tmp_path):
    made = iter(range(10))

    def make():
        if name == "memory":
            return MemoryBroker()
        return SqliteBroker(tmp_path / f"bus-{next(made)}")

    settings = Settings(sampling=TINY, publishers=(1, 3), rate=200)
    results = Results()
    measure_bus(results, settings, name, make, settings.least_memory)
    assert len(results.checks) == 4
    assert all(check.met for check in results.checks), results.checks
    assert len(results.figures) == 16
    assert all(figure.value > 0.0 for figure in results.figures)


def test_telemetry_is_timed_and_nothing_of_a_run_is_dropped(tmp_path):
    settings = Settings(sampling=TINY, steps=50)
    results = Results()
    measure_telemetry(results, settings)
    measure_training(results, settings, "torch", tmp_path)
    assert [row.rounds for row in results.rows] == [2, 2]
    assert all(check.met for check in results.checks), results.checks
    assert "messages" in results.notes[0]

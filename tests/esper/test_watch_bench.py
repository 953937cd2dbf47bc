"""The benchmark of the live page reads what it made; no time is looked at."""

from experiments.bench._paired import Sampling
from experiments.bench._results import Results
from experiments.bench.watch import Settings, free_port, measure_reader, processor_seconds


def test_the_reader_is_measured_on_a_run_that_it_thinned():
    results = Results(only="a run of")
    measure_reader(results, Settings(sampling=Sampling(rounds=2), rows=2_100))
    assert [check.met for check in results.checks] == [True]
    assert len(results.figures) == 4
    assert all(figure.value > 0 for figure in results.figures)


def test_a_rough_look_is_shorter():
    assert Settings(sampling=Sampling(rounds=90)).lasting == 9.0
    assert Settings(sampling=Sampling(rounds=10_000)).lasting == Settings().seconds
    assert free_port() > 0


def test_a_process_has_used_time():
    import os

    assert processor_seconds(os.getpid()) > 0.0

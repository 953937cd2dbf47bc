"""The benchmark of training runs, and both of its loops train the same; no time is looked at."""

import math
from itertools import pairwise

import numpy as np
import pytest

from experiments.bench._paired import Sampling
from experiments.bench._training_loops import Loop
from experiments.bench.training import Settings, Turns, measure, row_of

TINY = Sampling(rounds=2, builds=1, sample=1e-6, warmup=1, budget=0.0, least=2)
SETTINGS = Settings(
    sampling=TINY,
    mlp=(6, 4, 6),
    image=4,
    widths=(2,),
    batch=8,
    examples=64,
    stretch=5,
    decide_every=10,
    window=20,
    still=40,
    grafts=1,
    ramp_steps=10,
    large=(8, 8, 6),
    saves=2,
)


@pytest.mark.parametrize("name", ["jax MLP 6-4-6", "torch ConvHost 1x4-2-6"])
def test_it_runs_and_its_tables_have_their_rows(name):
    results = measure(SETTINGS, name)
    kinds = ["no boundaries", "boundaries", "boundaries, a kernel"]
    assert [row.name for row in results.rows] == [f"{name}: {kind}" for kind in kinds]
    assert all(row.rounds == 2 and row.candidate.microseconds > 0 for row in results.rows)
    assert [row.repeats for row in results.rows] == [5, 20, 20]
    (check,) = results.checks
    assert check.met, check
    names = [figure.name for figure in results.figures]
    assert sum("longest gap" in name for name in names) == 4
    assert sum("evaluation of 16 examples" in name for name in names) == 2
    assert all(math.isfinite(figure.value) for figure in results.figures)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_checkpoints_are_measured(backend):
    results = measure(SETTINGS, f"{backend} 8 MB")
    kinds = ("loop blocked", "in all on one core", "the same, synchronous", "hold")
    assert [f.name for f in results.figures] == [f"{backend} 8 MB: {kind}" for kind in kinds]
    assert all(math.isfinite(figure.value) for figure in results.figures)


def test_what_nobody_asked_for_is_not_measured():
    results = measure(SETTINGS, "zzz")
    assert results.nothing_wanted
    assert len(results.offered) == 18


def test_the_large_network_has_a_checkpoint_of_8_mb():
    sizes = Settings().large
    params = sum((a + 1) * b for a, b in pairwise(sizes))
    assert abs(3 * 4 * params - 8e6) < 0.1e6


def test_the_bare_loops_have_their_turns_and_evaluation_is_left_out():
    trained: list[tuple[str, int, int]] = []

    def loop(name: str) -> Loop:
        def train(first: int, last: int) -> float:
            trained.append((name, first, last))
            return 0.0

        def evaluate() -> None:
            own.evaluated += 1_000.0

        own = Loop(train, evaluate, 5)
        return own

    turns = Turns((loop("a"), loop("b")), 10, TINY, warmup=1)
    spent = 0.0
    for step in (10, 20, 30, 40):
        assert not turns.over()
        spent += 1_000.0
        turns.turn(step, spent)
    assert turns.over()
    # The first turn begins Tolaria's time, the second is warm-up.
    assert len(turns.seconds) == 2
    assert turns.evaluations == [1_000.0, 1_000.0]
    row = row_of([turns], "work", 1.0, 10)
    assert row.rounds == 2
    assert np.array(turns.seconds)[:, 2].max() < -999.0
    steps = [(first, last) for name, first, last in trained if name == "a"]
    assert steps == [(i, i + 5) for i in range(0, 40, 5)]
    assert {name for name, *_ in trained[::4]} == {"a", "b"}
    # Both evaluate twice in ten steps, which is in no bare time.
    assert np.array(turns.seconds)[:, :2].max() < -1_999.0

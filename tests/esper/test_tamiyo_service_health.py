"""Health on its way to a decision: what passes, what is sampled, what makes room."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper.contracts import HealthSignal, HealthSignalBatch
from esper.errors import InputError
from esper.tamiyo.service import (
    COUNTED,
    HEALTH,
    HealthCollector,
    RunningSpread,
    merge,
    rows_of,
)
from esper.tamiyo.service._sampling import hash_of, taken
from tests.esper.contract_values import data_of
from tests.esper.tamiyo_reports import signals


def totals(rows):
    return {name: int(rows[name].sum()) for name in COUNTED}


# Rows.


@given(data_of(HealthSignalBatch))
@settings(max_examples=30)
def test_what_a_contract_allows_is_a_row_each(batch):
    rows, invalid = rows_of(batch, 3)
    items = batch.items()
    fits = [
        all(value <= (1 << 63) - 1024 for value in (own.layer_id, own.seed_id, own.step,
                                                    own.epoch, own.error_count))
        for own in items
    ]  # fmt: skip
    kept = [own for own, fit in zip(items, fits, strict=True) if fit]
    assert (len(rows), invalid) == (len(kept), len(items) - len(kept))
    assert rows["layer"].tolist() == [own.layer_id for own in kept]
    assert rows["errors"].tolist() == [own.error_count for own in kept]
    assert rows["health"].tolist() == [own.health_score for own in kept]
    assert rows["faulty"].tolist() == [int(own.error_count > 0) for own in kept]
    assert rows["readies"].tolist() == [int(own.is_ready_for_transition) for own in kept]
    for own in kept:
        alone, _ = rows_of(own, 3)
        assert alone.dtype == HEALTH


@pytest.mark.parametrize(
    ("column", "bad"),
    [("health_score", np.nan), ("health_score", 1.5), ("activation_variance", np.inf),
     ("avg_correlation", -2.0), ("stage", 5), ("error_count", -1), ("layer_id", 0.5),
     ("epoch", None)],
)  # fmt: skip
def test_what_is_not_finite_or_out_of_range_is_left_out_and_counted(column, bad):
    good = 0.25 if column in ("health_score", "activation_variance", "avg_correlation") else 1
    collector = HealthCollector(sample=1.0)
    collector.admit("m", signals(3, **{column: (good, bad, good)}))
    assert (collector.outcomes.received, collector.outcomes.invalid) == (3, 1)
    (rows,) = collector.drain(["m"]).values()
    assert rows["signals"].sum() == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layer_id": (1, 2)}, "columns of a batch of health signals differ in length.*'layer': 2"),
        ({"stage": ("a", "b", "c")}, "column stage of a batch of health signals holds numbers"),
        ({"step": ((1,), (2,), (3,))}, "column step of a batch .* one for each signal"),
    ],
)
def test_columns_that_are_none_are_refused_and_nothing_is_taken(columns, message):
    collector = HealthCollector()
    with pytest.raises(InputError, match=message):
        collector.admit("m", signals(3, **columns))
    assert len(collector) == 0


# Merging.


def _rows(drawn):
    batch = signals(
        len(drawn),
        layer_id=[own[0] for own in drawn],
        seed_id=[own[1] for own in drawn],
        error_count=[own[2] for own in drawn],
        health_score=[own[3] / 8 for own in drawn],
    )
    return rows_of(batch, 0)[0]


ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.integers(0, 8)),
    max_size=20,
).map(_rows)


@given(ROWS, st.none() | st.integers(0, 25))
def test_merging_loses_no_signal_and_keeps_what_is_newest(rows, most):
    before = rows.copy()
    merged = merge(rows, most)
    assert rows.tobytes() == before.tobytes()
    assert totals(merged) == totals(rows)
    places = {(row["layer"], row["seed"]) for row in rows}
    gone = len(rows) - len(merged)
    assert gone == min(len(rows) - len(places), np.inf if most is None else most)
    assert (np.diff(merged["step"]) > 0).all()
    for layer, seed in places:
        of = [own[(own["layer"] == layer) & (own["seed"] == seed)] for own in (rows, merged)]
        assert of[1]["step"][-1] == of[0]["step"][-1]
        assert of[1]["health"][-1] == of[0]["health"][-1]
        assert of[1]["most_errors"].max() == of[0]["errors"].max()
        assert of[1]["least_health"].min() == of[0]["health"].min()


@given(ROWS, st.lists(st.integers(0, 4), max_size=4))
def test_merging_in_any_parts_is_merging_at_once(rows, parts):
    whole = merge(rows)
    for most in parts:
        rows = merge(rows, most)
    assert merge(rows).tobytes() == whole.tobytes()


# Sampling.


def test_what_is_sampled_depends_on_nothing_but_what_it_is_of():
    rows, _ = rows_of(signals(4_000, layer_id=range(4_000), seed_id=3), 0)
    own = hash_of("run-7")
    at = {rate: taken(own, rows, rate) for rate in (0.0, 0.1, 0.3, 1.0)}
    assert not at[0.0].any()
    assert at[1.0].all()
    # What is taken at a lower rate is taken at a higher one.
    assert not (at[0.1] & ~at[0.3]).any()
    # Within four standard deviations of a binomial.
    for rate in (0.1, 0.3):
        assert abs(at[rate].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(rows))
    # As of any part and any order.
    order = np.random.default_rng(0).permutation(len(rows))
    assert (taken(own, rows[order], 0.3) == at[0.3][order]).all()
    assert (taken(own, rows[:17], 0.3) == at[0.3][:17]).all()
    # Models differ, and so do steps and seeds.
    assert (taken(hash_of("run-8"), rows, 0.3) != at[0.3]).any()
    for name in ("step", "seed"):
        other = rows.copy()
        other[name] += 1
        assert (taken(own, other, 0.3) != at[0.3]).any()


def test_the_hash_is_the_same_in_every_process_and_for_every_batch():
    assert int(hash_of("a")) == 0x2F42665B399EF840
    assert hash_of("\ud800") != hash_of("a")
    first = HealthCollector(sample=0.5)
    second = HealthCollector(sample=0.5)
    first.admit("m", signals(1_000))
    for start in range(0, 1_000, 10):
        second.admit("m", signals(10, step=tuple(range(start, start + 10))))
    assert first.outcomes == second.outcomes


# Anomalies.


def test_anomalies_are_told_by_median_and_mad_by_hand():
    spread = RunningSpread(window=64)
    usual = np.linspace(0.3, 0.7, 41)
    assert not spread.judge(usual).any()
    # Median 0.5, MAD 0.1, so a score is anomalous beyond 0.5 ± 3.5 · 0.14826.
    found = spread.z_scores(np.array([0.5, 0.6, 1.0, 0.0]))
    np.testing.assert_allclose(found, np.array([0.0, 0.1, 0.5, 0.5]) / 0.14826, atol=1e-9)
    edge = 3.5 * 0.14826
    assert spread.judge(np.array([0.5 - edge - 1e-6, 0.5 - edge + 1e-6])).tolist() == [True, False]


def test_almost_half_of_the_scores_may_be_outliers():
    spread = RunningSpread(window=100)
    scores = np.tile([0.9, 0.91, 0.89, 0.1, 0.9], 20)
    spread.judge(scores)
    assert spread.judge(np.array([0.9, 0.1])).tolist() == [False, True]


def test_nothing_is_anomalous_before_enough_is_known_and_equal_scores_bear_a_hair():
    spread = RunningSpread()
    assert not spread.judge(np.array([*[0.9] * 31, 0.0])).any()
    spread = RunningSpread()
    spread.judge(np.full(50, 0.9))
    assert spread.judge(np.array([0.901, 0.8])).tolist() == [False, True]


def test_the_window_forgets():
    spread = RunningSpread(window=32)
    for _ in range(3):
        spread.judge(np.full(40, 0.9))
    spread.judge(np.full(40, 0.2))
    assert spread.judge(np.array([0.2, 0.9])).tolist() == [False, True]


def test_each_model_has_a_usual_of_its_own():
    collector = HealthCollector(sample=0.0)
    collector.admit("well", signals(100, health_score=0.9))
    collector.admit("ill", signals(100, health_score=0.3))
    collector.admit("well", signals(1, health_score=0.3))
    collector.admit("ill", signals(1, health_score=0.3))
    assert collector.outcomes.anomalous == 1
    assert collector.pressing() == {"well"}


# The buffer.


class Buffer(RuleBasedStateMachine):
    """Whatever comes, what must pass is in the buffer or was taken out of it."""

    def __init__(self):
        super().__init__()
        self.collector = HealthCollector(capacity=8, sample=0.5)
        self.out = dict.fromkeys(COUNTED, 0)
        self.step = 0
        self.seeds: set[tuple[str, int]] = set()
        self.newest: dict[tuple[str, int], int] = {}

    @rule(
        model=st.sampled_from("abc"),
        drawn=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 0, 0, 1, 7])), max_size=30),
        ready=st.booleans(),
    )
    def admit(self, model, drawn, ready):
        steps = tuple(range(self.step, self.step + len(drawn)))
        self.step += len(drawn)
        batch = signals(
            len(drawn), layer_id=[own[0] for own in drawn], step=steps,
            error_count=[own[1] for own in drawn], is_ready_for_transition=ready,
        )  # fmt: skip
        self.collector.admit(model, batch)
        for (layer, errors), step in zip(drawn, steps, strict=True):
            if errors or ready:
                self.seeds.add((model, layer))
                self.newest[model, layer] = step

    @rule(models=st.sets(st.sampled_from("abcd")), back=st.booleans())
    def drain(self, models, back):
        for model, rows in self.collector.drain(sorted(models)).items():
            if back:
                self.collector.give_back(rows)
                continue
            places = list(zip(rows["layer"].tolist(), rows["seed"].tolist(), strict=True))
            assert len(set(places)) == len(places)
            for name in COUNTED:
                self.out[name] += int(rows[name].sum())
            for row in rows[rows["faulty"] + rows["readies"] > 0]:
                # Nothing newer of it that had to pass is left.
                assert row["step"] >= self.newest.pop((model, int(row["layer"])))
            self.seeds = {own for own in self.seeds if own[0] != model}

    @invariant()
    def nothing_that_must_pass_is_lost(self):
        held = totals(self.collector._rows())
        outcomes = self.collector.outcomes
        counted = {
            "passing": outcomes.must_pass, "faulty": outcomes.faulty, "readies": outcomes.ready,
            "anomalous": outcomes.anomalous,
        }  # fmt: skip
        for name, count in counted.items():
            assert held[name] + self.out[name] == count
        taken_in = outcomes.must_pass + outcomes.sampled
        assert held["signals"] + self.out["signals"] + outcomes.evicted == taken_in
        assert outcomes.received == taken_in + outcomes.passed_over + outcomes.invalid

    @invariant()
    def it_is_bounded(self):
        assert len(self.collector) == len(self.collector._rows())
        # Every place is about seed 0 of one of 6 layers of one of 3 models.
        assert len(self.collector) <= max(8, 18)
        assert {model for model, _ in self.seeds} <= self.collector.pressing()


Buffer.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
TestBuffer = Buffer.TestCase


def test_normal_signals_make_room_first_the_oldest_of_them():
    collector = HealthCollector(capacity=8, sample=1.0)
    collector.admit("m", signals(6, layer_id=range(6)))
    collector.admit("m", signals(4, layer_id=range(10, 14), error_count=1, step=range(10, 14)))
    assert collector.outcomes.evicted == 3
    assert collector.outcomes.merged == 0
    (rows,) = collector.drain(["m"]).values()
    assert sorted(rows["layer"].tolist()) == [3, 4, 5, 10, 11, 12, 13]


def test_what_must_pass_is_merged_with_the_oldest_of_its_own_seed():
    collector = HealthCollector(capacity=8)
    layers = [0, 1, 0, 2, 1, 3, 4, 5, 6]
    collector.admit("m", signals(9, layer_id=layers, error_count=range(1, 10)))
    assert collector.outcomes.merged == 2
    rows = collector._rows()
    assert rows["layer"].tolist() == [0, 2, 1, 3, 4, 5, 6]
    assert rows["signals"].tolist() == [2, 1, 2, 1, 1, 1, 1]
    assert rows["errors"].tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_where_every_row_is_another_seed_s_the_buffer_grows():
    collector = HealthCollector(capacity=8)
    collector.admit("m", signals(30, layer_id=range(30), error_count=1))
    assert len(collector) == 30
    collector.admit("m", signals(30, layer_id=range(30), error_count=2))
    assert len(collector) == 30
    (rows,) = collector.drain(["m"]).values()
    assert (rows["signals"].tolist(), rows["errors"].tolist()) == ([2] * 30, [2] * 30)


def test_a_model_that_is_forgotten_leaves_nothing_and_is_counted():
    collector = HealthCollector()
    collector.admit("m", signals(3, error_count=1))
    collector.admit("n", signals(2, error_count=1))
    collector.forget("m")
    collector.forget("never heard of")
    assert collector.outcomes.forgotten == 3
    assert collector.pressing() == {"n"}
    assert len(collector.drain(["m", "n"])["m"]) == 0


def test_a_single_signal_is_taken_as_a_batch_of_one():
    one = HealthSignal(
        layer_id=1, seed_id=0, activation_variance=1.0, dead_neuron_ratio=0.0, avg_correlation=0.0,
        error_count=2,
    )  # fmt: skip
    first, second = HealthCollector(), HealthCollector()
    first.admit("m", one)
    second.admit("m", HealthSignalBatch.of([one]))
    assert first.drain(["m"])["m"].tobytes() == second.drain(["m"])["m"].tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity of a health collector must be a whole number of at least 1"),
        ({"sample": 1.5}, "sample of a health collector must be .* at most 1, got 1.5"),
        ({"window": 3}, "window of a health collector must be a whole number of at least 32"),
        ({"threshold": 0.0}, "threshold of a health collector must be"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        HealthCollector(**options)


def test_a_spread_refuses_a_window_that_is_too_short():
    with pytest.raises(InputError, match="a window of at least 32 .*got 5 and 3.5"):
        RunningSpread(5)

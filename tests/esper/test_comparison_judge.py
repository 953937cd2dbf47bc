"""Verdicts: what they say, and what changes nothing."""

import dataclasses
import math
import random as python_random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.tolaria.comparison import Verdict, Word, judge
from esper.tolaria.comparison._differences import on_a_grid
from tests.esper.comparison_outcomes import design, outcome, outcomes, typical


def words(verdict: Verdict) -> dict[str, Word]:
    return {pair.control: pair.word for pair in verdict.pairs}


# What is said


def test_the_four_words():
    verdict = judge(design(), typical())
    assert not verdict.refused
    assert words(verdict) == {
        "static-small": Word.BETTER,
        "static-final": Word.WORSE,
        "fixed": Word.EQUIVALENT,
        "random": Word.UNDECIDED,
    }
    assert verdict.require() is verdict
    assert verdict.pair("fixed").word is Word.EQUIVALENT
    assert "difference" not in " ".join(Word)


def test_a_lower_loss_is_better():
    verdict = judge(design(metric="test_loss"), typical())
    # The losses of these runs are 1 - accuracy.
    by_accuracy = judge(design(), typical())
    assert words(verdict) == words(by_accuracy)
    for ours, theirs in zip(verdict.pairs, by_accuracy.pairs, strict=True):
        assert ours.mean == pytest.approx(-theirs.mean)
        assert ours.superiority == theirs.superiority


def test_a_pair_by_hand():
    treated, untreated = [0.5, 0.625, 0.75, 0.875, 0.5, 0.5], [0.25, 0.5, 0.5, 0.625, 0.5, 0.625]
    runs = outcomes({"heuristic": treated, "small": untreated})
    plan = design(6, controls=("small",), smallest_effect=0.25)
    pair = judge(plan, runs).pair("small")
    assert pair.differences == (0.25, 0.125, 0.25, 0.25, 0.0, -0.125)
    assert pair.mean == 0.125
    assert pair.median == 0.1875
    assert pair.spread == pytest.approx(np.std(pair.differences, ddof=1))
    assert pair.d_z == pytest.approx(0.125 / pair.spread)
    assert pair.superiority == pytest.approx(4.5 / 6)
    # Of 64 sign patterns, those that sum to 6 or more in eighths, in size: counted by hand as
    # 2 × (all patterns of 2, 1, 2, 2, 0, 1 with at most 1 negative) = 2 × 2 × 3.
    assert pair.p == pytest.approx(12 / 64)
    assert pair.p_holm == pair.p
    assert pair.word is Word.UNDECIDED


def test_a_difference_that_is_found_and_does_not_matter_is_better_still():
    base = np.linspace(0.7, 0.8, 10)
    runs = outcomes({"heuristic": base + 0.001 + 1e-5 * np.arange(10), "small": base})
    pair = judge(design(controls=("small",)), runs).pair("small")
    assert pair.word is Word.BETTER
    assert pair.p_equivalent_holm <= 0.05


def test_the_same_everywhere_is_equivalent_and_said_to_be_degenerate():
    runs = outcomes(dict.fromkeys(("heuristic", "small"), [1.0] * 8))
    verdict = judge(design(8, controls=("small",)), runs)
    pair = verdict.pair("small")
    assert pair.word is Word.EQUIVALENT
    assert (pair.low, pair.high, pair.spread, pair.d_z, pair.p) == (0.0, 0.0, 0.0, None, 1.0)
    assert any("all differences are the same" in text for text in verdict.caveats)


def test_the_same_gap_everywhere_is_better_and_said_to_be_degenerate():
    runs = outcomes({"heuristic": [0.9, 0.8] * 4, "small": [0.8, 0.7] * 4})
    verdict = judge(design(8, controls=("small",)), runs)
    # 0.9 - 0.8 and 0.8 - 0.7 are not the same double.
    assert verdict.pair("small").degenerate
    assert verdict.pair("small").word is Word.BETTER


def beside_half(sixty_fourths: list[int], **changes) -> Verdict:
    """A treatment that differs from a control by so many 64ths."""
    gaps = {"heuristic": [0.5 + gap / 64 for gap in sixty_fourths], "small": [0.5] * 8}
    return judge(design(8, controls=("small",), **changes), outcomes(gaps))


def test_a_test_without_its_interval_claims_no_difference():
    pair = beside_half([5, 5, -4, 4, 8, 4, 2, 7], smallest_effect=0.07).pair("small")
    assert pair.p_holm <= 0.05
    assert pair.low < 0.0 < pair.high
    assert pair.word is Word.UNDECIDED


def test_a_test_without_its_interval_claims_no_equivalence():
    # One seed far away: its sign is one of many to a test, and its size is not.
    pair = beside_half([0, 0, -1, 0, 0, -1, 30, -1], smallest_effect=0.25).pair("small")
    assert pair.p_equivalent_holm <= 0.05
    assert pair.inner_high > 0.25
    assert pair.word is Word.UNDECIDED


def test_undecided_says_what_would_have_been_found():
    pair = judge(design(), typical()).pair("random")
    assert pair.power < 0.8
    assert pair.seeds_needed is not None
    assert pair.seeds_needed > 10
    assert pair.minimal_effect > 0.01


def test_arms_are_summarised_with_their_costs():
    runs = [
        dataclasses.replace(run, seconds=float(run.seed), parameters=40 + run.seed)
        for run in typical()
    ]
    arm = judge(design(), runs).arms[0]
    accuracies = np.sort([run.test_accuracy for run in runs if run.arm == "heuristic"])
    assert (arm.arm, arm.runs, arm.seconds, arm.parameters) == ("heuristic", 10, 4.5, 44.5)
    assert arm.mean == pytest.approx(accuracies.mean())
    assert arm.interquartile_mean == pytest.approx(accuracies[2:8].mean())
    assert (arm.least, arm.greatest) == (accuracies[0], accuracies[-1])


def test_budgets_are_judged_apart():
    runs = typical() + typical(budget="flops")
    assert judge(design(), runs) == judge(design(), typical())
    assert judge(design(budget="flops"), runs).design.budget == "flops"
    assert not judge(design(budget="flops"), runs).refused


def test_arms_that_the_design_does_not_name_are_passed_over():
    runs = [*typical(), outcome("bandit", 0, math.nan)]
    assert judge(design(), runs) == judge(design(), typical())


# What changes nothing


@settings(max_examples=5)
@given(st.randoms(use_true_random=False))
def test_the_order_of_outcomes_does_not_matter(random: python_random.Random):
    runs = typical(8)
    expected = judge(design(8), runs)
    random.shuffle(runs)
    assert judge(design(8), runs) == expected


accuracies = st.lists(
    st.integers(0, 192).map(lambda correct: correct / 192), min_size=6, max_size=6
)


@given(accuracies, accuracies, st.floats(-0.5, 0.5))
def test_adding_a_constant_to_all_arms_changes_nothing(treated, untreated, constant):
    plan = design(6, controls=("small",), metric="test_loss", smallest_effect=0.3)

    def judged(offset: float) -> Verdict:
        # A loss may be anything from 0 up; 1 keeps it there.
        rows = {"heuristic": treated, "small": untreated}
        runs = outcomes({arm: [1.0 - v for v in row] for arm, row in rows.items()})
        shifted = [
            dataclasses.replace(run, test_loss=(run.test_loss or 0.0) + 1.0 + offset)
            for run in runs
        ]
        return judge(plan, shifted)

    before, after = judged(0.0), judged(constant)
    assert before.refused == after.refused
    assert words(before) == words(after)
    for one, other in zip(before.pairs, after.pairs, strict=True):
        same(one, other, sign=1)


def same(one, other, sign: int) -> None:
    """Two pairs with the same numbers, or with all of them negated."""
    low, high = (one.low, one.high) if sign == 1 else (-one.high, -one.low)
    inner = (one.inner_low, one.inner_high) if sign == 1 else (-one.inner_high, -one.inner_low)
    got = [
        other.mean, other.median, other.spread, other.low, other.high, other.inner_low,
        other.inner_high, other.p, other.p_equivalent, other.power, other.minimal_effect,
    ]  # fmt: skip
    expected = [
        sign * one.mean, sign * one.median, one.spread, low, high, *inner, one.p,
        one.p_equivalent, one.power, one.minimal_effect,
    ]  # fmt: skip
    assert got == pytest.approx(expected, abs=1e-9)
    if one.d_z is None:
        assert other.d_z is None
    else:
        assert other.d_z == pytest.approx(sign * one.d_z)


@given(accuracies, accuracies)
def test_swapping_treatment_and_control_negates(treated, untreated):
    runs = outcomes({"a": treated, "b": untreated})
    forth = judge(design(6, treatment="a", controls=("b",), smallest_effect=0.2), runs)
    back = judge(design(6, treatment="b", controls=("a",), smallest_effect=0.2), runs)
    assert forth.refused == back.refused
    opposite = {Word.BETTER: Word.WORSE, Word.WORSE: Word.BETTER}
    for one, other in zip(forth.pairs, back.pairs, strict=True):
        same(one, other, sign=-1)
        assert other.word is opposite.get(one.word, one.word)
        assert other.superiority == pytest.approx(1.0 - one.superiority)


@given(st.lists(accuracies, min_size=3, max_size=4), st.floats(0.01, 0.4))
def test_words_agree_with_tests_and_intervals(rows, margin):
    controls = tuple(f"c{i}" for i in range(len(rows) - 1))
    runs = outcomes({"t": rows[0]} | dict(zip(controls, rows[1:], strict=True)))
    plan = design(6, treatment="t", controls=controls, smallest_effect=margin, alpha=0.2)
    for pair in judge(plan, runs).pairs:
        assert pair.low <= pair.inner_low <= pair.mean + 1e-12
        assert pair.mean - 1e-12 <= pair.inner_high <= pair.high
        if pair.word in (Word.BETTER, Word.WORSE):
            assert pair.p_holm <= 0.2
            assert pair.low > 0.0 or pair.high < 0.0
            assert (pair.mean > 0.0) == (pair.word is Word.BETTER)
        if pair.word is Word.EQUIVALENT:
            assert pair.p_equivalent_holm <= 0.2
            assert max(abs(pair.inner_low), abs(pair.inner_high)) < margin


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9).map(np.array))
def test_the_grid_is_fine_and_exact(values):
    scale = float(np.abs(values).max())
    found = on_a_grid(values, scale)
    np.testing.assert_allclose(found, values, atol=1e-12 * scale, rtol=0.0)
    # Sums of what is on it do not depend on their order.
    assert found.sum() == found[::-1].sum() == math.fsum(found)

"""A verdict in words, as a command prints it."""

import dataclasses
import math
import re

import numpy as np
from rich.cells import cell_len

from esper.tolaria.comparison import Verdict, describe, judge
from esper.tolaria.comparison._numbers import difference_text, p_text, size_text, value_text
from tests.esper.comparison_outcomes import design, outcomes, typical


def lines(verdict: Verdict) -> list[str]:
    text = describe(verdict)
    assert text.endswith("\n")
    assert all(cell_len(line) <= 100 and line == line.rstrip() for line in text.splitlines())
    return text.splitlines()


def flat(verdict: Verdict) -> str:
    return " ".join(" ".join(lines(verdict)).split())


def test_a_verdict_in_words():
    verdict = judge(design(), typical())
    text = flat(verdict)
    assert text.startswith(
        "heuristic at equal steps, 10 seeds, test accuracy heuristic is better than static-small;"
        " worse than static-final; equivalent to fixed within 1 point; undecided against random."
    )
    small, _, fixed, random = verdict.pairs
    assert (
        f"Better than static-small: test accuracy differs by +{100 * small.mean:.2f} points in the"
        f" mean of 10 pairs (95 % interval +{100 * small.low:.2f} to +{100 * small.high:.2f};"
        f" p 0.0020, corrected 0.0078; d_z {small.d_z:.2f}; better in 100 % of seeds, ties half)."
    ) in text
    assert "A difference below 1 point is not excluded (90 % interval" in text
    assert f"corrected p of equivalence {fixed.p_equivalent_holm:.4f})" in text
    assert "Neither a difference nor equivalence within 1 point is shown" in text
    assert f"for 80 % about {random.seeds_needed} seeds are needed" in text
    assert "no difference" not in text
    for assumption in verdict.assumptions:
        assert assumption in text


def test_a_refusal_in_words():
    text = flat(judge(design(), typical()[:-1]))
    assert "No verdict: these runs do not allow one. - the seeds are not paired" in text
    # No figure is given that could be taken for a verdict.
    assert "interval" not in text
    assert "better" not in text


def test_caveats_are_told():
    text = flat(judge(design(controls=("static-small",)), typical()))
    assert "Beware: - The design has no static-final, fixed, random:" in text


def test_long_and_wide_names_stay_in_a_hundred_columns():
    name, wide = "a-very-long-name-" * 8, "種子" * 40
    runs = outcomes({"heuristic": [0.9] * 8, name: [0.5] * 8, wide: [0.6] * 8})
    verdict = judge(design(8, controls=(name, wide), smallest_effect=0.05), runs)
    assert "better" in flat(verdict)
    assert name in "".join(line.strip() for line in lines(verdict))


def test_what_is_found_and_may_not_matter_is_told():
    base = [0.7 + 0.01 * i for i in range(10)]
    gaps = {"heuristic": [v + 0.001 * (1 + i % 3) for i, v in enumerate(base)], "small": base}
    text = flat(judge(design(controls=("small",)), outcomes(gaps)))
    assert "That the difference reaches 1 point, which would matter, is not shown." in text


def test_losses_have_no_points():
    text = flat(judge(design(metric="test_loss"), typical()))
    assert "test loss differs by -0.19" in text
    assert "point" not in text


def test_undecided_with_enough_power_names_no_number_of_seeds():
    gaps = np.linspace(-1.0, 1.0, 10)
    gaps = 0.01 + 0.018 * gaps / gaps.std(ddof=1)
    runs = outcomes({"heuristic": 0.5 + gaps, "small": [0.5] * 10})
    text = flat(judge(design(controls=("small",), smallest_effect=0.02), runs))
    assert "heuristic is undecided against small." in text
    assert re.search(
        r"A difference of 2 points had a chance of 8\d % to be found; with these", text
    )
    assert "seeds are needed" not in text


def test_a_run_without_times_says_so():
    runs = [dataclasses.replace(run, seconds=None) for run in typical()]
    assert "No wall times are recorded." in flat(judge(design(), runs))


def test_numbers():
    assert difference_text(-0.00001, "test_accuracy") == "0.00"
    assert difference_text(0.0123, "test_accuracy") == "+1.23"
    assert difference_text(-0.5, "test_loss") == "-0.5"
    assert difference_text(0.0, "test_loss") == "0"
    assert value_text(None, "test_loss") == value_text(math.nan, "test_accuracy") == "–"
    assert value_text(0.9876, "test_accuracy") == "98.76 %"
    assert (p_text(0.05), p_text(2e-5)) == ("0.0500", "2.0e-05")
    assert (size_text(0.01, "test_accuracy"), size_text(0.025, "test_accuracy")) == (
        "1 point", "2.5 points"
    )  # fmt: skip

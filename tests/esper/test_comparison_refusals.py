"""Verdicts that are refused, what verdicts leave open, and designs that cannot be judged."""

import dataclasses
import math

import numpy as np
import pytest

from esper.errors import EsperError, InputError
from esper.tolaria.comparison import Curve, VerdictRefused, Word, judge
from tests.esper.comparison_outcomes import CONTROLS, design, outcome, outcomes, typical

# What is refused


def without(arm: str, seed: int | None = None):
    return lambda runs: [r for r in runs if r.arm != arm or (seed is not None and r.seed != seed)]


def changed(arm: str, seed: int, **changes):
    """The runs with one of them made otherwise; changes of its setting by their own names."""

    def change(runs):
        return [
            outcome(r.arm, r.seed, r.test_accuracy, r.budget, **changes)
            if (r.arm, r.seed) == (arm, seed)
            else r
            for r in runs
        ]

    return change


def everything(arm: str, **changes):
    def change(runs):
        return [
            outcome(r.arm, r.seed, r.test_accuracy, r.budget, **changes) if r.arm == arm else r
            for r in runs
        ]

    return change


REFUSED = [
    (without("fixed"), "the arm 'fixed' is missing: expected .* 0, 1, .* got none; run it"),
    (without("heuristic"), "the arm 'heuristic' is missing"),
    (lambda runs: [], "the arm 'static-small' is missing"),
    (without("random", 3), "the seeds are not paired: 'random' lacks 3 of 0, 1"),
    (lambda runs: [*runs, outcome("fixed", 77, 0.9)],
     r"the seeds are not those of the design: 'fixed' has 77 beside 0, 1"),
    (lambda runs: [*runs, outcome("fixed", 2, 0.9, folder="elsewhere")],
     r"fixed, seed 2 has 2 outcomes \(elsewhere, runs/steps/fixed/seed-2\), expected one"),
    (changed("fixed", 1, folder="runs/steps/random/seed-1"),
     "the run runs/steps/random/seed-1 stands for fixed, seed 1 and for random, seed 1"),
    (changed("fixed", 1, ended=False, steps=300),
     "fixed, seed 1 did not end: .* step 300 of 500; go on with .*--resume runs/.*/fixed/seed-1"),
    (changed("fixed", 1, branched=True),
     r"fixed, seed 1 was branched off another run \(runs/.*\), .*; expected a run from step 0"),
    (changed("heuristic", 4, diverged_at=250),
     "heuristic, seed 4 diverged: its loss at step 250 is not finite, and no rollback"),
    (changed("random", 0, test_accuracy=math.nan), "random, seed 0 has no finite test_accuracy"),
    (changed("random", 0, test_accuracy=None), "random, seed 0 has no finite test_accuracy"),
    (changed("random", 0, test_accuracy=1.5), "a test_accuracy of 1.5, expected one from 0 to 1"),
    (everything("fixed", task="digits"),
     r"expected the task to be the same .* spirals \(heur.*\) against digits \(fixed, .*2 and 7"),
    (everything("fixed", task_digest="cd" * 32), "expected the digest of the task to be the same"),
    (changed("fixed", 1, task_digest=None), r"against none recorded \(fixed, seed 1\)"),
    (everything("fixed", backend="torch"), "expected the backend to be the same"),
    (everything("fixed", host_sites=("layers.0",)), "expected the host's layers to be the same"),
    (everything("fixed", host_parameters=43), "expected the host's parameters to be the same"),
    (everything("heuristic", kept=0, removed=0),
     "'heuristic' grafted nothing with any of its 10 seeds, so there is no growth to judge; give"),
    (everything("fixed", steps=600, planned_steps=600), r"expected equal steps, got 500 .* 600"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refusals(change, message):
    verdict = judge(design(), change(typical()))
    assert verdict.refused
    assert verdict.pairs == ()
    with pytest.raises(VerdictRefused, match=f"(?s)^no verdict under equal steps:.*{message}"):
        verdict.require()
    with pytest.raises(VerdictRefused):
        verdict.pair("fixed")
    assert issubclass(VerdictRefused, EsperError)


def test_seeds_in_which_nothing_was_grafted_are_told():
    runs = changed("heuristic", 4, kept=0, removed=0)(typical())
    verdict = judge(design(), changed("heuristic", 7, kept=0, removed=0)(runs))
    assert not verdict.refused
    (told,) = [text for text in verdict.caveats if "grafted nothing" in text]
    assert told.startswith("heuristic grafted nothing with 2 of its 10 seeds: there it is the host")
    assert not any("grafted nothing" in text for text in judge(design(), typical()).caveats)


def test_every_reason_is_told():
    runs = changed("fixed", 1, ended=False)(without("random")(typical()))
    assert [reason.split(":")[0] for reason in judge(design(), runs).refusals] == [
        "the arm 'random' is missing",
        "fixed, seed 1 did not end",
    ]


@pytest.mark.parametrize(("factor", "refused"), [(1.019, False), (0.981, False), (1.021, True),
                                                 (0.9, True), (math.nan, True)])  # fmt: skip
def test_equal_flops_are_equal_within_two_per_cent(factor, refused):
    runs = everything("fixed", training_flops=factor * 1e6)(typical(budget="flops"))
    verdict = judge(design(budget="flops"), runs)
    assert verdict.refused == refused
    if refused:
        (reason,) = verdict.refusals
        assert (
            "FLOPs of 'fixed' within 2 % or one step of those of 'heuristic', got 10 of 10 runs"
            in reason
        )


@pytest.mark.parametrize(("missing", "refused"), [(49e3, False), (51e3, True)])
def test_equal_flops_are_equal_within_a_step_too(missing, refused):
    # Cheap steps, and after a graft at step 400 one more of them, and then eight of 50,000: one is
    # 5 %, and a run cannot take half of it.
    spent = 1e6 - missing
    runs = everything(
        "fixed", training_flops=spent, steps=409, planned_steps=500,
        curve=Curve(
            steps=(0, 400, 409), flops=(0.0, spent - 1e3 - 8 * 50e3, spent),
            test_accuracy=(0.1, 0.5, 0.5), test_loss=(1.0, 0.5, 0.5),
        ),
    )(typical(budget="flops"))  # fmt: skip
    assert judge(design(budget="flops"), runs).refused == refused


def test_under_equal_flops_steps_may_differ_and_flops_must_be_counted():
    plan = design(budget="flops")
    longer = everything("fixed", steps=900, planned_steps=900)(typical(budget="flops"))
    assert not judge(plan, longer).refused
    unknown = everything("fixed", training_flops=None)(typical(budget="flops"))
    assert (
        "fixed, seed 0; fixed, seed 1; fixed, seed 2 and others did not count theirs"
        in (judge(plan, unknown).refusals[0])
    )
    # A treatment that counted nothing matches nothing.
    nothing = everything("heuristic", training_flops=0.0)(typical(budget="flops"))
    assert len(judge(plan, nothing).refusals) == len(CONTROLS)


def test_too_few_seeds_to_reach_alpha_whatever_they_show():
    verdict = judge(design(7, alpha=0.01), typical(7))
    (reason,) = verdict.refusals
    assert reason == (
        "too few seeds: with 7 no sign-flip test gives a p-value below 0.016, and 4 controls at"
        " alpha 0.01 take 0.0025 (Holm); expected at least 10 seeds"
    )
    assert judge(design(2), typical(2)).refused


def test_too_few_seeds_to_find_what_matters():
    random = np.random.default_rng(3)
    runs = outcomes({arm: 0.8 + 0.03 * random.normal(size=8) for arm in ("heuristic", "small")})
    verdict = judge(design(8, controls=("small",), smallest_effect=0.005), runs)
    (reason,) = verdict.refusals
    assert reason.startswith("too few seeds to decide anything: with 8")
    assert "small (spread" in reason
    needed = int(reason.split("about ")[1].split(" ")[0].replace(",", ""))
    assert needed > 100
    # With an effect that these seeds can find it is a verdict, though it may be undecided.
    assert not judge(design(8, controls=("small",), smallest_effect=0.09), runs).refused


def test_a_large_effect_is_found_however_small_the_power_for_a_small_one():
    random = np.random.default_rng(3)
    far = {"heuristic": 0.9 + 0.02 * random.normal(size=8), "small": [0.5] * 8}
    pair = judge(design(8, controls=("small",), smallest_effect=0.001), outcomes(far)).pair("small")
    assert pair.word is Word.BETTER
    assert pair.power < 0.1


def test_no_seeds_would_be_enough():
    random = np.random.default_rng(3)
    runs = outcomes({arm: 0.8 + 0.03 * random.normal(size=8) for arm in ("heuristic", "small")})
    verdict = judge(design(8, controls=("small",), smallest_effect=1e-6), runs)
    assert "about 100,000 and more seeds needed" in verdict.refusals[0]


# What is left open


@pytest.mark.parametrize(
    ("change", "caveat"),
    [
        (lambda runs: [dataclasses.replace(r, setting=dataclasses.replace(
            r.setting, task_digest=None)) for r in runs], "did not record the digest"),
        (lambda runs: [dataclasses.replace(r, setting=dataclasses.replace(
            r.setting, host_sites=None)) for r in runs], "did not record their host"),
        (everything("fixed", training_flops=None), "did not count their training FLOPs"),
        (everything("fixed", recipe=(("learning_rate", "0.1"),)),
         "Recipes differ between runs: learning_rate is 0.01 or 0.1."),
        (everything("fixed", versions=(("jax", "0.11.0"),)), "jax is 0.10.2 or 0.11.0."),
        (everything("fixed", rollbacks=2), "10 of 50 runs went back after a fault"),
    ],
)  # fmt: skip
def test_caveats(change, caveat):
    verdict = judge(design(), change(typical()))
    assert not verdict.refused
    assert any(caveat in text for text in verdict.caveats)


def test_without_caveats():
    assert judge(design(), typical()).caveats == ()


def test_controls_that_growth_needs_are_asked_for():
    verdict = judge(design(controls=("static-small",)), typical())
    assert verdict.caveats[0].startswith("The design has no static-final, fixed, random:")
    assert "There is one control" in " ".join(verdict.assumptions)


# Designs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": ()}, "expected at least one control, got none; .* static-small"),
        ({"controls": ("heuristic",)}, "expected every arm once, got 'heuristic' as two arms"),
        ({"controls": ("fixed", "fixed")}, "expected every arm once, got 'fixed' as two arms"),
        ({"controls": ("a\nb",)}, r"expected arms with printable names, got 'a\\nb'; rename it"),
        ({"treatment": " "}, "expected arms with printable names, got ' '"),
        ({"seeds": ()}, "expected seeds that differ, got none; give one for each run"),
        ({"seeds": (0, 1, 1)}, "expected seeds that differ, got 1 twice"),
        ({"metric": "f1"}, "the metric to be one of test_accuracy, test_loss, reward, got 'f1'"),
        ({"budget": "hours"}, "the budget to be one of steps, flops, got 'hours'"),
        ({"alpha": 0.0}, "expected alpha between 0 and 0.5, got 0.0; 0.05 is usual"),
        ({"alpha": 0.5}, "expected alpha between 0 and 0.5, got 0.5"),
        ({"alpha": math.nan}, "expected alpha between 0 and 0.5, got nan"),
        ({"smallest_effect": 0.0}, "above 0, got 0.0; say which difference in test_accuracy"),
        ({"smallest_effect": math.inf}, "above 0, got inf"),
        ({"smallest_effect": math.nan}, "above 0, got nan"),
    ],
)
def test_designs_that_cannot_be_judged(changes, message):
    with pytest.raises(InputError, match=f"the design is not valid: .*{message}"):
        design(**changes)


def test_a_pair_that_is_not_there():
    with pytest.raises(KeyError, match="expected one of the controls static-small, .*got 'bandit'"):
        judge(design(), typical()).pair("bandit")


def drawn(runs):
    """Every seed with data and a host of its own."""
    return [
        dataclasses.replace(
            run,
            setting=dataclasses.replace(
                run.setting,
                task=f"gym:moons?draw={run.seed}",
                task_digest=f"{run.seed:064x}",
                host_parameters=42 + run.seed,
            ),
        )
        for run in runs
    ]


def test_seeds_may_draw_their_tasks_where_the_design_says_so():
    runs = drawn(typical())
    assert judge(design(), runs).refused
    verdict = judge(design(task_by_seed=True), runs)
    assert not verdict.refused
    said = " ".join(verdict.assumptions)
    assert "data, the host's shape, the first weights and the batches" in said
    apart = [
        dataclasses.replace(run, setting=dataclasses.replace(run.setting, task_digest="ef" * 32))
        if (run.arm, run.seed) == ("fixed", 3)
        else run
        for run in runs
    ]
    (refusal,) = judge(design(task_by_seed=True), apart).refusals
    assert "the digest of the task to be the same in all runs of seed 3" in refusal
    other = judge(design(task_by_seed=True), everything("fixed", backend="torch")(runs))
    said = " ".join(other.refusals)
    assert "expected the backend to be the same in all runs, got" in said

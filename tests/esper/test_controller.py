"""The heuristic, and the verdict that it shares with the bandit."""

import math
from statistics import NormalDist

import pytest

from esper.errors import InputError
from esper.tamiyo import (
    Action,
    Cue,
    Decision,
    HeuristicController,
    PlateauTrigger,
    RandomTrigger,
    VerdictRule,
    Worth,
)
from esper_functional import Event, EventKind, SeedLifecycleState, apply_event, init_seeds
from tests.esper.controlled import OTHER, A, B, C, World, boundary, hold, observe


def controller(patience=2, **changes) -> HeuristicController:
    options = {
        "trigger": PlateauTrigger(patience=patience, min_improvement=0.1),
        "enough_loss": 0.01,
        "trial_steps": 100,
    }
    return HeuristicController(**(options | changes))


def always(**changes) -> HeuristicController:
    return controller(trigger=RandomTrigger(rate=1.0), **changes)


def worth(value, error=0.0) -> Worth:
    return Worth(value, value - error, value + error)


def test_grafts_on_a_plateau_and_not_before():
    tamiyo = controller()
    for step, loss in ((0, 1.0), (50, 0.8), (100, 0.79)):
        assert boundary(tamiyo, observe(step, loss)) == []
    (decision,) = boundary(tamiyo, observe(150, 0.785))
    assert (decision.action, decision.layer, decision.seed) == (Action.GRAFT, 0, 0)
    assert decision.kernel_id == A.kernel_id
    assert decision.confidence == A.confidence
    assert "0.785 has not fallen by 10% for 2 boundaries" in decision.reason
    # One trial at a time.
    for step in (200, 249):
        assert boundary(tamiyo, observe(step, 0.785, seeds=hold((0, 0)))) == []


@pytest.mark.parametrize("loss", [0.4, math.nan, math.inf])
def test_a_loss_that_is_low_enough_or_none_needs_no_graft(loss):
    tamiyo = controller(enough_loss=0.5)
    assert all(boundary(tamiyo, observe(50 * i, loss)) == [] for i in range(10))


def test_the_offset_chooses_where_to_begin():
    assert boundary(always(offset=4), observe(0))[0].kernel_id == B.kernel_id


@pytest.mark.parametrize(
    ("value", "action"),
    [(0.2, Action.FOSSILIZE), (0.0, Action.UNLOAD), (-1.0, Action.UNLOAD)],
)
def test_a_trial_ends_by_measured_worth(value, action):
    tamiyo = controller(patience=1)
    boundary(tamiyo, observe(0))
    assert boundary(tamiyo, observe(50))[0].action is Action.GRAFT
    assert boundary(tamiyo, observe(149, seeds=hold((0, 0)), worth=worth(value))) == []
    (decision,) = boundary(tamiyo, observe(150, seeds=hold((0, 0)), worth=worth(value)))
    assert decision.action is action
    assert f"rises by {value:.4g} without it" in decision.reason


def test_a_verdict_has_the_plateau_measured_anew():
    tamiyo = controller(patience=1)
    boundary(tamiyo, observe(0))
    boundary(tamiyo, observe(50))
    boundary(tamiyo, observe(150, seeds=hold((0, 0)), worth=worth(1.0)))
    # Boundary 150 is the new network's first, so 200 is one boundary without improvement.
    assert boundary(tamiyo, observe(200))[0].action is Action.GRAFT


# Verdicts


def test_a_verdict_by_hand():
    # ±0.098 is ±1.96 standard errors of 0.05: 0.05 is one of them above 0, 0.15 three.
    one, three = worth(0.05, 0.098), worth(0.15, 0.098)
    seen = observe(0, worth=lambda layer, seed: one if seed == 0 else three)
    by_value = [VerdictRule().judge(seen, (0, seed)) for seed in (0, 1)]
    assert [v.decision.action for v in by_value] == [Action.FOSSILIZE] * 2
    confidence = [v.decision.confidence for v in by_value]
    assert confidence == pytest.approx([0.8413, 0.99865], abs=1e-4)
    assert by_value[0].worth == one
    by_low = [VerdictRule(judge_by="low").judge(seen, (0, seed)).decision for seed in (0, 1)]
    assert [d.action for d in by_low] == [Action.UNLOAD, Action.FOSSILIZE]
    assert by_low[0].reason == (
        "validation loss rises by 0.05 without it (95 % interval -0.048 to 0.148), not more than 0,"
        " by the interval's lower end"
    )


@pytest.mark.parametrize("judge_by", ["value", "low"])
def test_a_worth_that_is_not_a_number_does_not_keep_a_kernel(judge_by):
    nan = Worth(math.nan, math.nan, math.nan)
    decision = VerdictRule(judge_by=judge_by).judge(observe(0, worth=nan), (0, 0)).decision
    assert (decision.action, decision.confidence) == (Action.UNLOAD, 0.5)


@pytest.mark.parametrize(
    ("found", "confidence"),
    [
        (Worth(0.1, math.nan, math.nan), 0.5),
        (Worth(0.1, 0.1, 0.1), 1.0),
        (Worth(0.0, 0.0, 0.0), 0.5),
        (Worth(0.1, 0.2, 0.0), 0.5),
    ],
)
def test_without_an_interval_nobody_is_sure(found, confidence):
    assert VerdictRule().judge(observe(0, worth=found), (0, 0)).decision.confidence == confidence


def test_by_the_lower_end_chance_keeps_one_worthless_kernel_in_forty():
    # Quantiles of a standard normal worth: an even sample without chance.
    drawn = [NormalDist().inv_cdf((i + 0.5) / 400) for i in range(400)]
    rule = VerdictRule(judge_by="low")
    kept = sum(
        rule.judge(observe(0, worth=worth(z, 1.96)), (0, 0)).decision.action is Action.FOSSILIZE
        for z in drawn
    )
    assert kept == 10


# What becomes of decisions


def test_a_graft_that_is_vetoed_starts_no_trial_and_is_asked_for_again():
    tamiyo = always()
    (asked,) = tamiyo.decide(observe(0))
    before = observe(0)
    tamiyo.told(before, [], [])
    (again,) = boundary(tamiyo, observe(50))
    assert again.kernel_id == asked.kernel_id
    assert boundary(tamiyo, observe(100, seeds=hold((0, 0)))) == []


def test_a_verdict_that_is_vetoed_is_given_again():
    tamiyo = always()
    boundary(tamiyo, observe(0))
    seen = {"seeds": hold((0, 0)), "worth": worth(1.0)}
    assert boundary(tamiyo, observe(100, **seen), vetoes=[0]) == []
    assert boundary(tamiyo, observe(150, **seen))[0].action is Action.FOSSILIZE


def test_trials_may_overlap_up_to_their_number():
    tamiyo = always(trials=2)
    world = World((1, 4), {0: [A, B, C]})
    grafts = []
    for _ in range(4):
        done = boundary(tamiyo, world.observe())
        world.obey(done)
        world.activate()
        grafts.append([(d.action, d.seed) for d in done])
        world.go_on()
    graft, unload = Action.GRAFT, Action.UNLOAD
    # Step 100: the first trial is over, and its place is free from the next boundary on.
    assert grafts == [[(graft, 0)], [(graft, 1)], [(unload, 0)], [(unload, 1), (graft, 0)]]


def test_a_failure_moves_on_to_the_next_blueprint_and_success_stays():
    tamiyo = always()
    world = World((1, 2), {0: [A, OTHER, B]})
    chosen = []
    # Unloaded, unloaded, kept, kept: low_rank fails, mlp fails, low_rank is kept.
    worths = iter([-1.0, -1.0, 1.0, 1.0])
    while not (world.seeds.stage == SeedLifecycleState.FOSSILIZED).all():
        done = boundary(tamiyo, world.observe(worth=lambda *_: worth(next(worths))))
        chosen += [(d.kernel_id, d.reason) for d in done if d.action is Action.GRAFT]
        world.obey(done)
        world.activate()
        world.go_on()
    # The n-th graft takes the n-th of its blueprint's kernels, counted around.
    assert [kernel for kernel, _ in chosen] == [x.kernel_id for x in (A, OTHER, A, B)]
    assert "; mlp after 1 failed here" in chosen[1][1]


def test_a_graft_has_the_plateau_measured_anew():
    tamiyo = controller(patience=1, trials=3, trial_steps=1_000)
    world, grafted = World((1, 4), {0: [A]}), []
    for _ in range(5):
        done = boundary(tamiyo, world.observe())
        grafted += [world.step for d in done if d.action is Action.GRAFT]
        world.obey(done)
        world.activate()
        world.go_on()
    # The first boundary of each network is its best so far, and the second is no better.
    assert grafted == [50, 150]


def test_two_failures_of_one_blueprint_at_once_are_one():
    tamiyo = always(trials=2)
    world = World((1, 2), {0: [A, OTHER]})
    world.obey(boundary(tamiyo, world.observe()))
    world.go_on()
    world.obey(boundary(tamiyo, world.observe()))
    for _ in range(2):
        world.happen(SeedLifecycleState.LOADING, EventKind.CANCEL)
    world.go_on()
    (decision,) = boundary(tamiyo, world.observe())
    assert decision.kernel_id == OTHER.kernel_id
    assert "; mlp after 1 failed here" in decision.reason


def test_a_retarget_ends_no_trial():
    # Of a controller around this one, which adds decisions of its own.
    tamiyo = always()
    boundary(tamiyo, observe(0))
    here = observe(50, seeds=hold((0, 0)))
    assert tamiyo.decide(here) == []
    tamiyo.told(here, [Decision(Action.RETARGET, 0, 0, "", alpha=0.5)], [])
    assert boundary(tamiyo, observe(100, seeds=hold((0, 0))))[0].action is Action.UNLOAD


@pytest.mark.parametrize("kind", [EventKind.FAIL, EventKind.CANCEL])
def test_a_load_that_failed_is_a_failure_of_its_blueprint(kind):
    tamiyo = always()
    world = World((1, 1), {0: [A, OTHER]})
    world.obey(boundary(tamiyo, world.observe()))
    world.happen(SeedLifecycleState.LOADING, kind)
    world.go_on()
    done = boundary(tamiyo, world.observe())
    if kind is EventKind.FAIL:
        assert (done[0].action, done[0].reason) == (Action.RESET, "its kernel could not be loaded")
        world.obey(done)
        world.go_on()
        done = boundary(tamiyo, world.observe())
    assert done[0].kernel_id == OTHER.kernel_id


def test_an_output_that_is_not_finite_is_said_in_the_reset():
    tamiyo = always()
    world = World((1, 1), {0: [A]})
    world.obey(boundary(tamiyo, world.observe()))
    world.activate()
    world.happen(SeedLifecycleState.ACTIVE, EventKind.ERRORS, 3.0)
    world.go_on()
    (decision,) = boundary(tamiyo, world.observe())
    assert decision.action is Action.RESET
    assert decision.reason == "its output was not finite 3 times in a row"


def test_what_was_taken_back_is_no_failure():
    tamiyo = always()
    world = World((1, 1), {0: [A, OTHER]})
    world.obey(boundary(tamiyo, world.observe()))
    world.activate()
    world.go_on()
    world.go_back(1)
    # The seed is DORMANT again, and the same blueprint is tried once more.
    assert boundary(tamiyo, world.observe())[0].kernel_id == A.kernel_id


def test_a_kernel_that_comes_back_with_the_past_is_on_trial_again():
    tamiyo = always()
    boundary(tamiyo, observe(0))
    boundary(tamiyo, observe(100, seeds=hold((0, 0))))  # unloaded
    # The run went back to step 50, where the kernel was there: it is judged 100 steps later.
    for step in (50, 100):
        assert boundary(tamiyo, observe(step, seeds=hold((0, 0)))) == []
    (decision,) = boundary(tamiyo, observe(150, seeds=hold((0, 0))))
    assert decision.action is Action.UNLOAD


def test_another_kernel_in_a_trials_seed_is_another_trial():
    tamiyo = always()
    boundary(tamiyo, observe(0))
    assert boundary(tamiyo, observe(50, seeds=hold((0, 0), kernel=B))) == []
    assert boundary(tamiyo, observe(100, seeds=hold((0, 0), kernel=B))) == []
    assert boundary(tamiyo, observe(150, seeds=hold((0, 0), kernel=B)))[0].seed == 0


def test_a_cue_that_names_a_layer_is_followed_or_nothing_is_done():
    class Names:
        """A trigger of a user's own."""

        def cue(self, observation):
            return Cue("there", 1)

        def reset(self):
            pass

        def state(self):
            return {}

        def restore(self, state):
            pass

    both = {0: [A], 1: [B]}
    (decision,) = boundary(
        controller(trigger=Names()), observe(0, seeds=init_seeds(2, 1), candidates=both)
    )
    assert decision.layer == 1
    full = hold((1, 0), shape=(2, 1))
    full = apply_event(full, Event(2, 1, 0, EventKind.FOSSILIZE))
    assert boundary(controller(trigger=Names()), observe(0, seeds=full, candidates=both)) == []


def test_layers_are_taken_in_order_of_preference():
    seeds = init_seeds(2, 1)
    (first,) = boundary(always(), observe(0, seeds=seeds, candidates={1: [B], 0: [A]}))
    assert first.layer == 1
    (second,) = boundary(always(), observe(0, seeds=seeds, candidates={1: [], 0: [A]}))
    assert second.layer == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enough_loss": -1.0}, r"enough_loss must be a finite number of at least 0, got -1"),
        ({"trial_steps": 0}, r"trial_steps must be a whole number of at least 1, got 0"),
        ({"trials": 0}, r"trials must be a whole number of at least 1, got 0"),
        ({"offset": -1}, r"offset must be a whole number of at least 0, got -1"),
        ({"min_worth": math.inf}, r"min_worth must be a finite number, got inf"),
        ({"judge_by": "high"}, r"judge_by must be one of value, low, got 'high'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        controller(**values)

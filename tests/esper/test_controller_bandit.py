import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import InputError
from esper.tamiyo import (
    Action,
    BanditController,
    DiscountedUcb,
    RandomTrigger,
    Worth,
    trial_reward,
)
from esper_functional import EventKind, SeedLifecycleState
from tests.esper.controlled import A, World, boundary, hold, observe, record

LOW, MLP = (0, "low_rank"), (0, "mlp")


# The arms


def played(*rewards, exploration=2.0, discount=1.0) -> DiscountedUcb:
    arms = DiscountedUcb(exploration=exploration, discount=discount)
    for arm, reward in rewards:
        arms.record(arm, reward)
    return arms


HISTORY = ((LOW, 0.6), (MLP, 0.5), (LOW, 0.2))


def test_ucb1_by_hand():
    # Three plays: 0.8/2 + sqrt(2 ln 3 / 2) = 0.4 + 1.0481, and 0.5 + sqrt(2 ln 3) = 0.5 + 1.4823.
    arms = played(*HISTORY)
    assert arms.index(LOW) == pytest.approx(1.4481, abs=1e-4)
    assert arms.index(MLP) == pytest.approx(1.9823, abs=1e-4)
    assert arms.index((1, "mlp")) == math.inf
    assert arms.describe(LOW) == "mean reward 0.4 over 2 tries, bound 1.448"
    assert arms.describe((1, "mlp")) == "never tried"


def test_discounted_ucb_by_hand():
    # γ = 1/2: LOW has 1/4 + 1 = 1.25 plays and 0.15 + 0.2 = 0.35, MLP 0.5 and 0.25; n = 1.75.
    # 0.28 + sqrt(2 ln 1.75 / 1.25) = 0.28 + 0.9462, and 0.5 + sqrt(2 ln 1.75 / 0.5) = 0.5 + 1.4962.
    arms = played(*HISTORY, discount=0.5)
    assert arms.index(LOW) == pytest.approx(1.2262, abs=1e-4)
    assert arms.index(MLP) == pytest.approx(1.9962, abs=1e-4)


def test_counts_that_have_faded_below_one_explore_nothing():
    # One play a while ago: n = 1/2, whose logarithm is below 0.
    arms = played((LOW, 0.0), exploration=2.0, discount=0.5)
    assert arms.index(LOW) == 0.0


def test_arms_that_were_never_played_come_first_and_by_chance():
    arms = played(*HISTORY)
    new = [(1, "low_rank"), (1, "mlp"), (2, "mlp")]
    chosen = {arms.choose([LOW, *new], (), np.random.default_rng(i)) for i in range(40)}
    assert chosen == set(new)


def test_an_arm_that_is_awaited_is_played_again_only_where_there_is_no_other():
    arms, rng = played(*HISTORY), np.random.default_rng(0)
    assert arms.choose([LOW, MLP], (), rng) == MLP
    assert arms.choose([LOW, MLP], {MLP}, rng) == LOW
    assert arms.choose([MLP], {MLP}, rng) == MLP
    assert arms.choose([LOW, MLP], {LOW, MLP}, rng) == MLP


def test_the_better_arm_is_found():
    arms, rng = played(discount=0.95), np.random.default_rng(0)
    means, counts = {LOW: 0.9, MLP: 0.1}, {LOW: 0, MLP: 0}
    for _ in range(500):
        arm = arms.choose([MLP, LOW], (), rng)
        counts[arm] += 1
        arms.record(arm, float(rng.random() < means[arm]))
    assert counts[LOW] > 350


def test_what_has_changed_is_found_sooner_where_rewards_fade():
    def tries(discount):
        """How often the arm that was better gives nothing until the other one is tried."""
        arms = played(*[(LOW, 1.0), (MLP, 0.0)] * 100, discount=discount)
        for k in range(1_000):
            if arms.choose([LOW, MLP], (), np.random.default_rng(0)) == MLP:
                return k
            arms.record(LOW, 0.0)
        return math.inf

    # UCB1 leaves it when 100/(100 + k) + sqrt(2 ln(200 + k)/(100 + k)) < sqrt(2 ln(200 + k)/100):
    # 0.2 + 0.1600 against 0.3577 at k = 400, and 0.1984 + 0.1594 against 0.3579 at k = 404.
    assert tries(1.0) == 404
    assert tries(0.9) < 10


@given(
    plays=st.lists(st.tuples(st.sampled_from([LOW, MLP]), st.floats(0, 1)), max_size=30),
    discount=st.floats(0.01, 1.0),
)
def test_arms_restored_choose_as_they_would_have(plays, discount):
    arms = played(*plays, discount=discount)
    other = played(discount=discount)
    other.restore(json.loads(json.dumps(arms.state(), allow_nan=False)))
    for arm in (LOW, MLP):
        assert other.index(arm) == arms.index(arm)
        other.record(arm, 0.25)
        arms.record(arm, 0.25)
    assert other.state() == arms.state()


# Rewards


def test_a_reward_by_hand():
    # 1 without the kernel, 0.75 with it: a quarter is gone. Half the host's parameters at 0.1.
    assert trial_reward(0.25, 0.75, parameters=50, host_parameters=100, price=0.1) == pytest.approx(
        0.25 - 0.05
    )


@given(
    worth=st.floats(allow_nan=True, allow_infinity=True),
    loss=st.floats(0, 1e6),
    parameters=st.integers(0, 10**6),
    host=st.integers(0, 10**6),
    price=st.floats(0, 10),
)
def test_a_reward_is_in_range_and_grows_with_worth_and_falls_with_cost(
    worth, loss, parameters, host, price
):
    def reward(worth, parameters):
        return trial_reward(worth, loss, parameters=parameters, host_parameters=host, price=price)

    here = reward(worth, parameters)
    assert 0.0 <= here <= 1.0
    assert reward(worth, parameters + 10) <= here
    if math.isfinite(worth) and abs(worth) < 1e9:
        assert reward(worth + 0.5, parameters) >= here - 1e-12
    if not worth > 0.0:
        assert here == 0.0


# The controller

CANDIDATES = {0: [record("a", parameters=10), record("m", "mlp", parameters=20)]}


def bandit(**changes) -> BanditController:
    options = {"trigger": RandomTrigger(rate=1.0), "trial_steps": 50, "price": 0.5}
    return BanditController(**(options | changes))


def arms_of(controller):
    return {(layer, name): (n, total) for layer, name, n, total in controller.state()["arms"]}


def test_a_trial_teaches_its_measured_worth_net_of_cost():
    tamiyo = bandit(discount=1.0)
    world = World((1, 1), CANDIDATES)
    worth = {"low_rank": Worth(1.0, 0.9, 1.1), "mlp": Worth(-1.0, -1.1, -0.9)}
    blueprint = {r.kernel_id: r.blueprint for r in CANDIDATES[0]}
    grafted, chosen = "", []
    for _ in range(5):
        here = worth.get(grafted, Worth(0, 0, 0))
        (done,) = boundary(tamiyo, world.observe(1.0, 1.0, worth=here))
        world.obey([done])
        world.activate()
        world.go_on()
        if done.action is Action.GRAFT:
            grafted = blueprint[done.kernel_id]
            chosen.append(grafted)
        elif done.action is Action.FOSSILIZE:
            # It has filled the only seed: the next one is tried on an empty layer.
            step, world = world.step, World((1, 1), CANDIDATES)
            world.step = step
    # 1 of 2 is gone, less 0.5 · 10/100: 0.45. A worth below 0 is 0.
    known = arms_of(tamiyo)
    assert sorted(chosen[:2]) == ["low_rank", "mlp"]
    assert known[LOW] == pytest.approx((1.0, 0.45))
    assert known[MLP] == (1.0, 0.0)
    # Both were tried once, so the third is the one that paid.
    assert chosen[2] == "low_rank"


def test_the_reason_says_what_was_known():
    tamiyo = bandit()
    (decision,) = boundary(tamiyo, observe(0, candidates={0: [A]}))
    assert decision.reason.endswith("below the rate of 1; low_rank here: never tried")
    assert decision.confidence == A.confidence


@pytest.mark.parametrize("kind", [EventKind.CANCEL, EventKind.FAIL, EventKind.ERRORS])
def test_a_kernel_that_failed_gave_nothing(kind):
    tamiyo = bandit()
    world = World((1, 1), {0: [A]})
    world.obey(boundary(tamiyo, world.observe()))
    if kind is EventKind.ERRORS:
        world.activate()
        world.happen(SeedLifecycleState.ACTIVE, kind, 3.0)
    else:
        world.happen(SeedLifecycleState.LOADING, kind)
    world.go_on()
    boundary(tamiyo, world.observe())
    assert arms_of(tamiyo) == {LOW: (1.0, 0.0)}


def test_a_verdict_that_is_vetoed_teaches_nothing_yet():
    tamiyo = bandit()
    boundary(tamiyo, observe(0, candidates={0: [A]}))
    seen = {"seeds": hold((0, 0)), "candidates": {0: [A]}, "worth": Worth(1.0, 1.0, 1.0)}
    boundary(tamiyo, observe(50, **seen), vetoes=[0])
    assert arms_of(tamiyo) == {}
    boundary(tamiyo, observe(100, **seen))
    assert arms_of(tamiyo)[LOW][0] == 1.0


def test_a_kernel_of_nobodys_choice_teaches_nothing():
    tamiyo = bandit()
    stranger = hold((0, 0), kernel=record("stranger"))
    for step in (0, 50):
        done = boundary(tamiyo, observe(step, seeds=stranger, candidates={0: [A]}))
    assert [d.action for d in done] == [Action.UNLOAD]
    assert arms_of(tamiyo) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exploration": -1.0}, r"exploration must be a finite number of at least 0, got -1"),
        ({"discount": 0.0}, r"discount must be .* of at least 0\.001 and at most 1, got 0"),
        ({"discount": 1.5}, r"discount must be .* at most 1, got 1\.5"),
        ({"price": -0.1}, r"price must be a finite number of at least 0, got -0\.1"),
        ({"enough_loss": -1}, r"enough_loss must be a finite number of at least 0, got -1"),
        ({"trial_steps": 0}, r"trial_steps must be a whole number of at least 1, got 0"),
        ({"trials": 0}, r"trials must be a whole number of at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        bandit(**values)

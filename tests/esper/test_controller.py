import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper.tamiyo import Action, HeuristicController, Observation
from esper.urza import KernelRecord
from esper_functional import Event, EventKind, SeedLifecycleState, apply_event, init_seeds


def record(letter: str) -> KernelRecord:
    return KernelRecord(letter * 64, "0" * 64, "low_rank", "2->8 float32", "zero", 0.5, 0, 1, 1, 1)


CANDIDATES = {0: [record("a"), record("b"), record("c")]}


def controller(**changes) -> HeuristicController:
    options = {
        "patience": 2,
        "min_improvement": 0.1,
        "enough_loss": 0.01,
        "trial_steps": 100,
        "min_worth": 0.0,
        "offset": 0,
    }
    return HeuristicController(**(options | changes))


def observe(step, loss, seeds=None, worth=0.0) -> Observation:
    seeds = init_seeds(1, 2) if seeds is None else seeds
    return Observation(step, loss, loss, seeds, ("layers.0",), CANDIDATES, lambda *_: worth)


def active(kernel="a"):
    state = apply_event(init_seeds(1, 2), Event(0, 0, 0, EventKind.LOAD, kernel * 64))
    return apply_event(state, Event(1, 0, 0, EventKind.ACTIVATE, kernel * 64, 0.0))


def test_grafts_on_a_plateau_and_not_before():
    tamiyo = controller()
    for step, loss in ((0, 1.0), (50, 0.8), (100, 0.79)):
        assert tamiyo.decide(observe(step, loss)) == []
    (decision,) = tamiyo.decide(observe(150, 0.785))
    assert (decision.action, decision.layer, decision.seed) == (Action.GRAFT, 0, 0)
    assert decision.kernel_id == "a" * 64
    assert "0.785 has not fallen by 10% for 2 boundaries" in decision.reason
    # One trial at a time.
    assert tamiyo.decide(observe(200, 0.785, active())) == []


def test_a_loss_that_is_low_enough_needs_no_graft():
    tamiyo = controller(enough_loss=0.5)
    assert all(tamiyo.decide(observe(50 * i, 0.4)) == [] for i in range(10))


def test_the_offset_chooses_where_to_begin():
    tamiyo = controller(offset=4, patience=1)
    tamiyo.decide(observe(0, 1.0))
    assert tamiyo.decide(observe(50, 1.0))[0].kernel_id == "b" * 64


@pytest.mark.parametrize(
    ("worth", "action"), [(0.2, Action.FOSSILIZE), (0.0, Action.UNLOAD), (-1.0, Action.UNLOAD)]
)
def test_a_trial_ends_by_measured_worth(worth, action):
    tamiyo = controller(patience=1)
    tamiyo.decide(observe(0, 1.0))
    tamiyo.decide(observe(50, 1.0))
    assert tamiyo.decide(observe(149, 1.0, active(), worth)) == []
    (decision,) = tamiyo.decide(observe(150, 1.0, active(), worth))
    assert decision.action is action
    assert f"rises by {worth:.4g} without it" in decision.reason


def test_a_worth_that_is_not_a_number_does_not_keep_a_kernel():
    tamiyo = controller(patience=1)
    tamiyo.decide(observe(0, 1.0))
    tamiyo.decide(observe(50, 1.0))
    (decision,) = tamiyo.decide(observe(150, 1.0, active(), math.nan))
    assert decision.action is Action.UNLOAD


class Machine(RuleBasedStateMachine):
    """Whatever the losses and worths are, only legal requests are made."""

    def __init__(self) -> None:
        super().__init__()
        self.tamiyo = controller()
        self.seeds = init_seeds(1, 2)
        self.step = 0

    @rule(loss=st.floats(1e-3, 2.0), worth=st.floats(-1.0, 1.0), forget=st.booleans())
    def boundary(self, loss, worth, forget) -> None:
        if forget:
            fresh = controller()
            fresh.restore(self.tamiyo.state())
            assert fresh.state() == self.tamiyo.state()
            self.tamiyo = fresh
        for decision in self.tamiyo.decide(observe(self.step, loss, self.seeds, worth)):
            kinds = {
                Action.GRAFT: [EventKind.LOAD, EventKind.ACTIVATE],
                Action.FOSSILIZE: [EventKind.FOSSILIZE],
                Action.UNLOAD: [EventKind.UNLOAD],
                Action.RESET: [EventKind.RESET],
            }[decision.action]
            for kind in kinds:
                event = Event(self.step, decision.layer, decision.seed, kind, decision.kernel_id)
                self.seeds = apply_event(self.seeds, event)
        self.step += 50

    @precondition(lambda self: (self.seeds.stage == SeedLifecycleState.ACTIVE).any())
    @rule()
    def fail(self) -> None:
        seed = int((self.seeds.stage[0] == SeedLifecycleState.ACTIVE).argmax())
        event = Event(self.step, 0, seed, EventKind.ERRORS, value=3.0)
        self.seeds = apply_event(self.seeds, event)

    @invariant()
    def one_trial_at_a_time(self) -> None:
        assert (self.seeds.stage == SeedLifecycleState.ACTIVE).sum() <= 1


TestMachine = Machine.TestCase

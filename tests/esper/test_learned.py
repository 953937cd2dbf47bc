"""The controller that learned: what its policy chooses is done, if it can judge."""

import dataclasses
import sys

import numpy as np
import pytest

from esper.errors import InputError
from esper.tamiyo import Action, LearnedController, Remarking, Worth
from esper.tamiyo.policy import ALPHAS, Choice, Kind
from esper_functional import Event, EventKind, apply_event, init_seeds
from tests.esper.advisors import WAITING, SmallAdvice, small_advisor
from tests.esper.controlled import A, B, boundary, hold, observe, record

OTHER = record("other", "gated")
CANDIDATES = {0: [A, OTHER, B], 1: [OTHER]}


class Fixed:
    """Always the same advice, whatever it is shown."""

    def __init__(self, choice, **more):
        self.advice = SmallAdvice(choice, **more)

    def decide(self, graph):
        return self.advice


def choice(kind, node=0, seed=0, kernel=0, alpha=0):
    return Choice(*(np.int32(own) for own in (kind, node, seed, kernel, alpha)))


def seen(step=50, seeds=None, **more):
    own = init_seeds(2, 2) if seeds is None else seeds
    return observe(step, seeds=own, candidates=CANDIDATES, **more)


def test_a_graft_is_of_the_kernel_that_was_chosen():
    own = LearnedController(policy=Fixed(choice(Kind.GRAFT, node=0, kernel=0)))
    taken = hold((0, 0), kernel=A, shape=(2, 2))
    # Variants of one description in turn, into the first free seed.
    for step, kernel in ((50, A), (100, B), (150, A)):
        (decision,) = boundary(own, seen(step, taken))
        assert (decision.action, decision.layer, decision.seed) == (Action.GRAFT, 0, 1)
        assert decision.kernel_id == kernel.kernel_id
    # What was vetoed was not grafted.
    assert boundary(own, seen(200, taken), vetoes=[0]) == []
    (decision,) = boundary(own, seen(250, taken))
    assert decision.kernel_id == B.kernel_id
    assert decision.confidence == 0.75
    assert decision.reason == (
        "the policy expects +0.2 of reward by it (-0.1 to +0.5); most by progress +0.5,"
        " site_depth -0.25"
    )
    assert (decision.uncertainty, decision.effect) == (0.3, Worth(0.2, -0.1, 0.5))
    assert decision.features == (("progress", 0.5), ("site_depth", -0.25))


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        (Kind.UNLOAD, Action.UNLOAD),
        (Kind.FOSSILIZE, Action.FOSSILIZE),
        (Kind.RETARGET, Action.RETARGET),
    ],
)
def test_seeds_are_decided_about_one_by_one(kind, action):
    own = LearnedController(policy=Fixed(choice(kind, node=1, seed=1, alpha=2)))
    (decision,) = own.decide(seen(50, hold((1, 1), kernel=OTHER, shape=(2, 2))))
    assert (decision.action, decision.layer, decision.seed) == (action, 1, 1)
    assert decision.kernel_id == ""
    assert decision.alpha == (ALPHAS[2] if action is Action.RETARGET else 1.0)


def test_waiting_is_no_decision_and_resets_come_first():
    broken = hold((0, 0), kernel=A, shape=(2, 2))
    broken = apply_event(broken, Event(50, 0, 0, EventKind.ERRORS, value=3.0))
    waits = LearnedController(policy=Fixed(choice(Kind.WAIT)))
    assert waits.decide(seen()) == []
    assert waits.remarks() == ()
    assert [own.action for own in waits.decide(seen(100, broken))] == [Action.RESET]
    grafts = LearnedController(policy=Fixed(choice(Kind.GRAFT, node=1, kernel=1)))
    found = grafts.decide(seen(100, broken))
    assert [own.action for own in found] == [Action.RESET, Action.GRAFT]


def test_why_it_waits_is_said():
    advisor = Fixed(WAITING, remark="the network is unlike any")
    own = LearnedController(policy=advisor)
    assert isinstance(own, Remarking)
    assert own.decide(seen()) == []
    assert own.remarks() == ("waits: the network is unlike any",)
    # Said at the boundary, and not again.
    advisor.advice = SmallAdvice(choice(Kind.GRAFT))
    assert len(own.decide(seen(100))) == 1
    assert own.remarks() == ()


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "esper.tamiyo.policy", None)
    with pytest.raises(InputError, match=r"needs .*, which is not installed; install"):
        LearnedController(policy=Fixed(WAITING))


def test_confidence_stays_within_its_bounds():
    for given, wanted in ((1.5, 1.0), (-0.5, 0.0)):
        advisor = Fixed(choice(Kind.GRAFT), confidence=given)
        (decision,) = LearnedController(policy=advisor).decide(seen())
        assert decision.confidence == wanted


def test_what_is_chosen_is_a_function_of_what_was_seen():
    found = []
    for _ in range(2):
        own = LearnedController(policy=small_advisor({"graft": 1.0}), offset=1)
        found.append([own.decide(seen(50 * i, train=1.0 / i)) for i in range(1, 5)])
    assert found[0] == found[1]
    assert any(found[0])


def test_a_model_without_a_topology_is_refused():
    blind = dataclasses.replace(seen(), topology=None)
    with pytest.raises(InputError, match="came without the model's topology"):
        LearnedController(policy=Fixed(choice(Kind.WAIT))).decide(blind)

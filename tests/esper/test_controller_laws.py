"""What holds of every controller, whatever happens to its run."""

import json

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from esper.tamiyo import Action, Probe, Veto, Worth, make_controller
from esper_functional import EventKind, SeedLifecycleState
from tests.esper.advisors import small_advisor
from tests.esper.controlled import OTHER, A, B, C, World

S = SeedLifecycleState
CANDIDATES = {1: [A, OTHER, B], 0: [C, OTHER]}
SHAPE = (2, 3)
TRIALS = 2

KINDS = {
    "fixed": {
        "schedule": [
            {"step": 0, "action": "graft", "layer": 1, "kernel": 2, "alpha": 0.5},
            {"step": 0, "action": "graft", "layer": 0, "seed": 1},
            {"step": 50, "action": "graft", "layer": 1, "kernel": A.kernel_id},
            {"step": 100, "action": "retarget", "layer": 1, "alpha": 0.2},
            {"step": 150, "action": "unload", "layer": 1},
            {"step": 150, "action": "fossilize", "layer": 0, "seed": 1},
            {"step": 200, "action": "graft", "layer": 1},
        ]
    },
    "fixed, regular": {"every": 75, "first": 50, "offset": 1},
    "random": {"grafts": 0.6, "trial_steps": 100, "trials": TRIALS, "max_grafts": 5},
    "heuristic": {
        "trigger": {"kind": "plateau", "patience": 1},
        "trial_steps": 100,
        "trials": TRIALS,
        "judge_by": "low",
    },
    "heuristic, held-out": {"trigger": {"kind": "held_out_gain", "window": 1}, "trial_steps": 50},
    "heuristic, bottleneck": {
        "trigger": {"kind": "gradient_bottleneck", "threshold": 0.8},
        "trial_steps": 100,
    },
    "bandit": {"trigger": {"kind": "random", "rate": 0.7}, "trial_steps": 100, "trials": TRIALS},
    "learned": {"policy": small_advisor({"graft": 2.0, "unload": 1.0})},
    "bandit, regular": {"trigger": {"kind": "schedule", "every": 50}, "trial_steps": 50},
}

NEEDED = {
    Action.GRAFT: S.DORMANT,
    Action.FOSSILIZE: S.ACTIVE,
    Action.UNLOAD: S.ACTIVE,
    Action.RETARGET: S.ACTIVE,
    Action.RESET: S.ERROR_RECOVERY,
}


def make(kind):
    return make_controller(kind.split(",")[0], **KINDS[kind])


def copied(kind, controller):
    fresh = make(kind)
    fresh.restore(json.loads(json.dumps(controller.state(), allow_nan=False)))
    assert fresh.state() == controller.state()
    return fresh


class Machine(RuleBasedStateMachine):
    """One controller goes straight on, another forgets itself and is restored."""

    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.straight, self.other = make(self.kind), make(self.kind)
        self.world = World(SHAPE, CANDIDATES)

    def seen(self, train, validation):
        step = self.world.step

        def worth(layer, seed):
            value = float(np.random.default_rng([step, layer, seed]).normal())
            return Worth(value, value - 0.5, value + 0.5)

        def probe(layer):
            x, g = np.random.default_rng([step, layer]).normal(size=(2, 4, 3)).astype(np.float32)
            return Probe(x, g, g, 1.0)

        return self.world.observe(train, validation, worth=worth, probe=probe)

    @rule(
        train=st.floats(0.0, 2.0) | st.just(float("nan")),
        validation=st.floats(0.0, 2.0),
        vetoes=st.sets(st.integers(0, 3)),
        forget=st.sampled_from(["not", "before", "between"]),
        load=st.booleans(),
    )
    def boundary(self, train, validation, vetoes, forget, load) -> None:
        if forget == "before":
            self.other = copied(self.kind, self.other)
        decisions = self.straight.decide(self.seen(train, validation))
        # Each observation has a generator of its own, in the same state.
        assert self.other.decide(self.seen(train, validation)) == decisions
        if forget == "between":
            self.other = copied(self.kind, self.other)
        self.check(decisions)
        vetoed = [
            Veto(d, "test", "")
            for index, d in enumerate(decisions)
            if index in vetoes and d.action not in (Action.UNLOAD, Action.RESET)
        ]
        refused = [v.decision for v in vetoed]
        applied = [d for d in decisions if d not in refused]
        for controller in (self.straight, self.other):
            controller.told(self.seen(train, validation), applied, vetoed)
        assert self.straight.state() == self.other.state()
        self.world.obey(applied)
        if load:
            self.world.activate()
        self.world.go_on()

    def check(self, decisions) -> None:
        stages = self.world.seeds.stage
        for decision in decisions:
            assert stages[decision.layer, decision.seed] == NEEDED[decision.action]
            assert decision.reason
            if decision.action is Action.GRAFT:
                known = [record.kernel_id for record in CANDIDATES[decision.layer]]
                assert decision.kernel_id in known
        places = [(d.layer, d.seed) for d in decisions]
        assert len(set(places)) == len(places)
        failed = {(int(r), int(s)) for r, s in np.argwhere(stages == S.ERROR_RECOVERY)}
        assert failed == {(d.layer, d.seed) for d in decisions if d.action is Action.RESET}
        if not self.kind.startswith(("fixed", "learned")):
            grafts = sum(d.action is Action.GRAFT for d in decisions)
            busy = int(np.isin(stages, [S.LOADING, S.ACTIVE]).sum())
            most = KINDS[self.kind].get("trials", 1)
            assert not grafts or busy + grafts <= most

    @rule(kind=st.sampled_from([EventKind.FAIL, EventKind.CANCEL]))
    def load_fails(self, kind) -> None:
        self.world.happen(S.LOADING, kind)

    @rule()
    def output_fails(self) -> None:
        self.world.happen(S.ACTIVE, EventKind.ERRORS, 3.0)

    @rule(boundaries=st.integers(1, 6))
    def goes_back(self, boundaries) -> None:
        self.world.go_back(boundaries)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_controller(kind):
    machine = type("Machine", (Machine,), {"kind": kind})
    machine.TestCase.settings = settings(stateful_step_count=40)
    machine.TestCase().runTest()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_controller_grafts_when_nothing_is_in_its_way(kind):
    # Else the laws above could hold of a controller that does nothing.
    world, controller = World(SHAPE, CANDIDATES), make(kind)
    actions = set()
    for _ in range(12):
        probe = Probe(*np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32), 1.0)
        seen = world.observe(probe=lambda _, probe=probe: probe)
        decisions = controller.decide(seen)
        controller.told(seen, decisions, [])
        world.obey(decisions)
        world.activate()
        world.go_on()
        actions |= {d.action for d in decisions}
    assert Action.GRAFT in actions
    assert kind.startswith("fixed, regular") or Action.UNLOAD in actions

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from esper.errors import InputError
from esper.tamiyo import (
    RULES,
    Action,
    Cost,
    Decision,
    FixedController,
    Guard,
    Safety,
    Scheduled,
    Veto,
    Worth,
)
from esper.tamiyo._places import NEEDED_STAGE
from esper_functional import SeedLifecycleState, init_seeds
from tests.esper.controlled import World, hold, observe, record

GRAFT, FOSSILIZE, UNLOAD, RESET, RETARGET = (
    Action.GRAFT,
    Action.FOSSILIZE,
    Action.UNLOAD,
    Action.RESET,
    Action.RETARGET,
)
SMALL, MIDDLE, LARGE = (record(str(n), parameters=n, flops=10 * n) for n in (10, 20, 30))
KERNELS = {k.kernel_id: k for k in (SMALL, MIDDLE, LARGE)}
CANDIDATES = {layer: [SMALL, MIDDLE, LARGE] for layer in (0, 1)}
HOST = Cost(100, 1_000.0)
PLACES = [(layer, seed) for layer in (0, 1) for seed in (0, 1, 2)]


def graft(layer=0, seed=0, kernel=SMALL, confidence=1.0):
    return Decision(GRAFT, layer, seed, "", kernel.kernel_id, confidence=confidence)


def seen(step=0, seeds=None, now=HOST, rollbacks=()):
    return observe(
        step,
        seeds=init_seeds(2, 3) if seeds is None else seeds,
        candidates=CANDIDATES,
        host=HOST,
        now=now,
        rollbacks=rollbacks,
    )


def in_stage(stage, layer=0, seed=0):
    """Seeds of which one is in a stage."""
    stages = np.zeros((2, 3), np.uint8)
    stages[layer, seed] = stage
    return init_seeds(2, 3).replace(stage=stages)


def reasons(vetoes):
    return [f"{veto.rule}: {veto.reason}" for veto in vetoes]


# Each rule by hand


def test_cooldown_by_hand():
    guard = Guard(Safety(cooldown_steps=50))
    assert guard.review(seen(100), [graft()])[0] == [graft()]
    other = graft(layer=1)
    allowed, vetoes = guard.review(seen(120, hold((0, 0), shape=(2, 3))), [graft(seed=1), other])
    # Layer 0 was changed at 100; that its kernel became ACTIVE is seen now.
    assert allowed == [other]
    assert reasons(vetoes) == ["cooldown: layers.0 changed 0 steps ago, and may change after 50"]
    again = hold((0, 0), shape=(2, 3))
    _, vetoes = guard.review(seen(140, again), [graft(seed=1)])
    assert reasons(vetoes) == ["cooldown: layers.0 changed 20 steps ago, and may change after 50"]
    assert guard.review(seen(170, again), [graft(seed=1)])[1] == []


def test_a_change_that_was_allowed_is_none_when_it_is_seen():
    guard = Guard(Safety(cooldown_steps=50))
    keep = Decision(FOSSILIZE, 0, 0, "")
    there = hold((0, 0), shape=(2, 3))
    guard.review(seen(100, there), [keep])
    fossil = there.replace(stage=np.where(there.stage == 2, 4, there.stage).astype(np.uint8))
    assert guard.review(seen(150, fossil), [graft(seed=1)])[1] == []


def test_one_change_of_a_site_at_a_boundary_where_there_is_a_cooldown():
    guard = Guard(Safety(cooldown_steps=50))
    unload = Decision(UNLOAD, 0, 0, "")
    there = hold((0, 0), (0, 1), shape=(2, 3))
    wanted = [unload, graft(seed=2), Decision(UNLOAD, 0, 1, "")]
    allowed, vetoes = guard.review(seen(0, there), wanted)
    # What frees a seed passes, and begins a cooldown for what does not.
    assert [d.action for d in allowed] == [UNLOAD, UNLOAD]
    assert [v.rule for v in vetoes] == ["cooldown"]


def test_rate_by_hand():
    guard = Guard(Safety(max_adaptations=2, interval_steps=100))
    wanted = [graft(seed=0), graft(seed=1), graft(seed=2)]
    allowed, vetoes = guard.review(seen(0), wanted)
    assert allowed == wanted[:2]
    assert reasons(vetoes) == [
        "rate: 2 changes were allowed in the last 100 steps, and no more than 2 may be"
    ]
    reset = Decision(RESET, 1, 0, "")
    broken = in_stage(SeedLifecycleState.ERROR_RECOVERY, 1)
    assert guard.review(seen(99, broken), [wanted[0], reset])[0] == [reset]
    assert guard.review(seen(100), wanted)[0] == wanted[:2]


def test_confidence_by_hand():
    guard = Guard(Safety(min_confidence=0.9))
    given = (0.9, 0.89, math.nan)
    wanted = [graft(seed=seed, confidence=own) for seed, own in enumerate(given)]
    allowed, vetoes = guard.review(seen(0), wanted)
    assert allowed == wanted[:1]
    assert reasons(vetoes) == [
        "confidence: confidence is 0.89, and must be 0.9",
        "confidence: confidence is nan, and must be 0.9",
    ]
    unload = Decision(UNLOAD, 0, 0, "", confidence=0.0)
    there = hold((0, 0), shape=(2, 3))
    assert guard.review(seen(0, there), [unload])[0] == [unload]


def test_parameters_by_hand():
    # 100 of the host, 15 loading; 20 are allowed, then 30 are too many for 150 and 10 are not.
    guard = Guard(Safety(max_parameters=150))
    wanted = [graft(kernel=MIDDLE), graft(seed=1, kernel=LARGE), graft(seed=2, kernel=SMALL)]
    allowed, vetoes = guard.review(seen(0, now=Cost(115, 1_000.0)), wanted)
    assert allowed == [wanted[0], wanted[2]]
    (reason,) = reasons(vetoes)
    assert reason == (
        "parameters: 135 parameters, with what is loading and was just allowed, and 30 more are"
        " 165, and no more than 150 may be"
    )


def test_flops_by_hand():
    guard = Guard(Safety(max_flops_factor=1.25))
    wanted = [graft(kernel=MIDDLE), graft(seed=1, kernel=SMALL)]
    allowed, vetoes = guard.review(seen(0, now=Cost(115, 1_045.0)), wanted)
    assert allowed == [wanted[0]]
    assert "1245 FLOPs an example, " in vetoes[0].reason
    assert "100 more are 1345, and no more than 1250 may be" in vetoes[0].reason


def test_of_two_bounds_the_lower_one_holds():
    for safety in (
        Safety(max_parameters=500, max_parameters_factor=1.2),
        Safety(max_parameters=120, max_parameters_factor=5.0),
    ):
        allowed, vetoes = Guard(safety).review(seen(0), [graft(kernel=LARGE), graft()])
        assert allowed == [graft()]
        assert "no more than 120 may be" in vetoes[0].reason


def test_a_kernel_whose_cost_is_not_known_passes_no_budget():
    stranger = Decision(GRAFT, 0, 0, "", "f" * 64)
    guard = Guard(Safety(max_parameters=10**9))
    (veto,) = guard.review(seen(0), [stranger], lambda *_: None)[1]
    assert veto.rule == "parameters"
    assert veto.reason == (
        "what the kernel costs is not known, and no more than 1000000000 parameters may be"
    )
    cool = Guard(Safety(cooldown_steps=5))
    assert cool.review(seen(0), [stranger], lambda *_: None)[0] == [stranger]


def test_what_an_unload_frees_counts_when_it_is_free():
    guard = Guard(Safety(max_parameters=110))
    there = hold((0, 0), shape=(2, 3), kernel=SMALL)
    wanted = [Decision(UNLOAD, 0, 0, ""), graft(layer=1)]
    allowed, vetoes = guard.review(seen(0, there, now=Cost(110, 1_100.0)), wanted)
    assert (allowed, [v.rule for v in vetoes]) == (wanted[:1], ["parameters"])
    assert guard.review(seen(50), wanted[1:])[0] == wanted[1:]


def test_calm_by_hand():
    guard = Guard(Safety(calm_steps=100))
    assert guard.review(seen(300), [graft()])[1] == []
    unload = Decision(UNLOAD, 1, 0, "")
    there = hold((1, 0), shape=(2, 3))
    # Taken back from step 340 to step 250: growth goes on at 440.
    for step in (250, 439):
        now = seen(step, there, rollbacks=(340,))
        allowed, vetoes = guard.review(now, [graft(), unload])
        assert allowed == [unload]
        (reason,) = reasons(vetoes)
        assert reason == (
            "calm: the run was taken back from step 340, and may be changed again from step 440"
            f" on, 100 steps later; it is at step {step}"
        )
    assert guard.review(seen(440, rollbacks=(340,)), [graft()])[1] == []


def test_what_was_taken_back_was_not_allowed_and_its_site_has_just_changed():
    guard = Guard(Safety(max_adaptations=1, interval_steps=1_000))
    guard.review(seen(100), [graft()])
    assert guard.review(seen(50, rollbacks=(140,)), [graft()])[0] == [graft()]
    # The same boundary again, which only the rollback tells from a second review.
    assert guard.review(seen(50, rollbacks=(140, 90)), [graft()])[0] == [graft()]
    assert guard.review(seen(50, rollbacks=(140, 90)), [graft()])[0] == []
    cool = Guard(Safety(cooldown_steps=50))
    cool.review(seen(100), [graft()])
    _, vetoes = cool.review(seen(50, rollbacks=(140,)), [graft(seed=1)])
    assert "layers.0 changed 0 steps ago" in vetoes[0].reason


def test_uncertainty_by_hand():
    guard = Guard(Safety(max_uncertainty=0.5))
    given = (0.5, None, 0.75, math.nan)
    wanted = [
        dataclasses.replace(graft(layer, seed), uncertainty=own)
        for (layer, seed), own in zip(PLACES, given, strict=False)
    ]
    allowed, vetoes = guard.review(seen(0), wanted)
    assert allowed == wanted[:2]
    assert reasons(vetoes) == [
        "uncertainty: the effect is uncertain by 0.75 for want of data, and may be by 0.5",
        "uncertainty: the effect is uncertain by nan for want of data, and may be by 0.5",
    ]


def test_stability_by_hand():
    guard = Guard(Safety(max_loss_spread=0.25))
    there = hold((1, 0), shape=(2, 3))
    unload = Decision(UNLOAD, 1, 0, "")
    shaken = dataclasses.replace(seen(0, there), loss_spread=0.3)
    allowed, vetoes = guard.review(shaken, [graft(), unload])
    assert allowed == [unload]
    (reason,) = reasons(vetoes)
    assert reason == (
        "stability: the training losses since the last boundary spread by 0.3 of their mean, and"
        " may by 0.25"
    )
    for spread in (0.25, math.nan):
        calm = dataclasses.replace(seen(50), loss_spread=spread)
        assert Guard(Safety(max_loss_spread=0.25)).review(calm, [graft()])[0] == [graft()]


def test_a_kernel_that_does_harm_is_unloaded_by_hand():
    guard = Guard(Safety(unload_below_worth=0.1, judge_after_steps=100))
    worths = {(0, 0): Worth(-0.3, -0.4, -0.2), (0, 1): Worth(-0.3, -0.5, -0.1)}
    asked = []

    def worth(layer, seed):
        asked.append((layer, seed))
        return worths[layer, seed]

    def see(step, *places, decisions=()):
        there = hold(*places, shape=(2, 3))
        now = observe(step, seeds=there, candidates=CANDIDATES, worth=worth)
        copy = Guard(Safety(unload_below_worth=0.1, judge_after_steps=100))
        copy.restore(json.loads(json.dumps(guard.state())))
        found = guard.review(now, decisions)
        assert copy.review(now, decisions) == found
        assert copy.state() == guard.state()
        return found

    both = (0, 0), (0, 1)
    assert see(0) == ([], [])
    assert see(50, *both) == see(100, *both) == ([], [])
    assert asked == []
    unload = Decision(
        UNLOAD, 0, 0,
        "it does harm: without it the validation loss rises by -0.3 (-0.4 to -0.2), and what is"
        " below -0.1 is unloaded",
    )  # fmt: skip
    # The interval of the other one reaches the bound; what cannot be kept any more is not.
    allowed, vetoes = see(150, *both, decisions=[Decision(FOSSILIZE, 0, 0, "")])
    assert allowed == [unload]
    assert [veto.rule for veto in vetoes] == ["legal"]
    assert sorted(set(asked)) == list(both)
    # Judged again as long after; a new kernel in the same seed begins anew.
    asked.clear()
    assert see(200, *both) == ([], [])
    assert asked == []
    see(250, *both)
    assert set(asked) == {(0, 1)}
    assert see(300, *both)[0] == [unload]
    # Who asks for it already is not asked twice.
    see(350), see(400, *both)
    own = Decision(UNLOAD, 0, 0, "by itself")
    assert see(500, *both, decisions=[own])[0] == [own]


# What is not legal


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("stage", SeedLifecycleState)
def test_an_action_needs_its_stage(action, stage):
    wanted = Decision(action, 0, 0, "", SMALL.kernel_id if action is GRAFT else "")
    allowed, vetoes = Guard(Safety()).review(seen(0, in_stage(stage)), [wanted])
    if stage is NEEDED_STAGE[action]:
        assert (allowed, vetoes) == ([wanted], [])
    else:
        assert allowed == []
        (reason,) = reasons(vetoes)
        assert reason == (
            f"legal: {action} needs a seed that is {NEEDED_STAGE[action].name}, and seed 0 of"
            f" layers.0 is {stage.name}"
        )


def test_decisions_of_one_boundary_are_judged_by_what_those_before_them_lead_to():
    there = hold((0, 0), shape=(2, 3))
    keep, unload = Decision(FOSSILIZE, 0, 0, ""), Decision(UNLOAD, 0, 0, "")
    ramp = Decision(RETARGET, 0, 0, "", alpha=0.5)
    for wanted, done in (
        ([graft(seed=1), graft(seed=1)], [graft(seed=1)]),
        ([unload, unload], [unload]),
        ([keep, unload, ramp], [keep]),
        ([ramp, unload, keep], [ramp, unload]),
        ([unload, graft(), unload], [unload, graft()]),
    ):
        allowed, vetoes = Guard(Safety()).review(seen(0, there), wanted)
        assert allowed == done
        assert {veto.rule for veto in vetoes} == {"legal"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (graft(layer=2), "there is no seed 0 of layer 2: seeds are 2 × 3"),
        (graft(seed=-1), "there is no seed -1 of layer 0: seeds are 2 × 3"),
        (
            Decision(GRAFT, 0, 0, "", SMALL.kernel_id, alpha=math.nan),
            "alpha is nan, and lies in [0, 1]",
        ),
        (Decision(GRAFT, 0, 0, "", "f" * 64), "kernel ffffffffffff is no candidate for layers.0"),
    ],
)
def test_what_cannot_be_done_is_refused_and_explained(wanted, message):
    guard = Guard(Safety(max_adaptations=1))
    allowed, vetoes = guard.review(seen(0), [wanted, graft()])
    # What was refused is not counted.
    assert (allowed, reasons(vetoes)) == ([graft()], [f"legal: {message}"])


def test_a_kernel_that_cannot_be_had_is_refused_and_a_layer_without_candidates_too():
    said = Guard(Safety()).review(seen(0), [graft()], lambda layer, kernel: "it is gone")[1]
    assert reasons(said) == ["legal: it is gone"]
    nowhere = dataclasses.replace(seen(0), candidates={1: [SMALL]})
    assert reasons(Guard(Safety()).review(nowhere, [graft()])[1]) == [
        "legal: nothing may be grafted in layers.0"
    ]


def test_vetoes_are_counted_by_rule_and_go_back_with_the_run():
    guard = Guard(Safety(min_confidence=0.5, max_adaptations=1))
    assert guard.vetoes == {}
    low = graft(layer=1, confidence=0.1)
    guard.review(seen(0), [graft(), graft(), low, low, graft(seed=1)])
    assert guard.vetoes == {"legal": 1, "rate": 3}
    before = json.loads(json.dumps(guard.state()))
    guard.count([Veto(graft(), "max_grafts", "")])
    assert guard.vetoes == {"legal": 1, "max_grafts": 1, "rate": 3}
    guard.restore(before)
    assert guard.vetoes == {"legal": 1, "rate": 3}
    # And what a guard remembered that counted none is read.
    guard.restore({name: own for name, own in before.items() if name != "vetoes"})
    assert guard.vetoes == {}


def test_what_the_guard_did_by_itself_is_not_what_a_schedule_asked_for():
    fixed = FixedController(schedule=[Scheduled(0, FOSSILIZE, 0, 0)])
    there = hold((0, 0), shape=(2, 3))
    wanted = fixed.decide(seen(100, there))
    assert [own.action for own in wanted] == [FOSSILIZE]
    fixed.told(seen(100, there), [Decision(UNLOAD, 0, 0, "")], [Veto(wanted[0], "legal", "")])
    assert [own.action for own in fixed.decide(seen(150, there))] == [FOSSILIZE]


# The table


def test_the_table_in_the_docstring_is_the_one_in_the_code():
    lines = [line.strip() for line in (Safety.__doc__ or "").splitlines()]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line]
    head, _, *rules = rows
    actions = [Action(name.lower()) for name in head[1:]]
    table = {
        name: frozenset(a for a, cell in zip(actions, cells, strict=True) if cell)
        for name, *cells in rules
    }
    assert table == dict(RULES)
    assert list(table) == list(RULES)
    assert set(actions) == set(Action)


# Laws

SAFETIES = {
    "none": Safety(),
    "all": Safety(
        cooldown_steps=100,
        max_adaptations=3,
        interval_steps=200,
        min_confidence=0.3,
        max_parameters=155,
        max_flops_factor=1.5,
        calm_steps=50,
    ),
    "rate": Safety(max_adaptations=2, interval_steps=120),
    "cooldown": Safety(cooldown_steps=70),
    "budgets": Safety(max_parameters_factor=1.4, max_flops=1_500.0),
    "confidence and calm": Safety(min_confidence=0.7, calm_steps=120),
}


class Machine(RuleBasedStateMachine):
    """No history of reviews exceeds a bound; what is checked is counted from the world alone."""

    name = ""

    @initialize()
    def begin(self) -> None:
        self.safety = SAFETIES[self.name]
        self.guard = Guard(self.safety)
        self.world = World((2, 3), CANDIDATES)
        self.adapted: list[int] = []
        """Steps of adaptations that stand."""
        self.stages: list[tuple[int, list[list[int]]]] = []
        """After each boundary that stands."""
        self.held: dict[int, dict] = {}
        self.kernels: dict[tuple[int, int], str] = {}

    def cost(self) -> Cost:
        held = [KERNELS[k] for k in self.kernels.values()]
        return Cost(
            HOST.parameters + sum(k.parameter_count for k in held),
            HOST.flops + sum(k.flops for k in held),
        )

    @rule(
        wishes=st.lists(
            st.tuples(
                st.sampled_from([GRAFT, GRAFT, FOSSILIZE, UNLOAD, RETARGET, RESET]),
                st.integers(0, 5),
                st.sampled_from([SMALL, MIDDLE, LARGE]),
                st.floats(0, 1),
            ),
            max_size=6,
        ),
        forget=st.booleans(),
        k=st.integers(0, 5),
    )
    def boundary(self, wishes, forget, k) -> None:
        step, safety = self.world.step, self.safety
        self.held[step] = dict(self.kernels)
        decisions = []
        for action, at, kernel, confidence in wishes:
            kernel_id = kernel.kernel_id if action is GRAFT else ""
            which = f"wish {len(decisions)}"
            decisions.append(Decision(action, *PLACES[at], which, kernel_id, confidence=confidence))
        observation = self.world.observe(host=HOST, now=self.cost())
        before = json.loads(json.dumps(self.guard.state(), allow_nan=False))
        allowed, vetoes = self.guard.review(observation, decisions)

        def fresh() -> Guard:
            guard = Guard(safety)
            guard.restore(before)
            return guard

        # Restored from before, it says the same; and of the first k decisions what it says of all.
        again = fresh()
        assert again.review(observation, decisions) == (allowed, vetoes)
        some, _ = fresh().review(observation, decisions[:k])
        assert some == [d for d in decisions[:k] if d in allowed]
        if forget:
            self.guard = again
        assert sorted([d for d in decisions if d in allowed], key=decisions.index) == allowed
        assert {id(d) for d in allowed} | {id(v.decision) for v in vetoes} == set(
            map(id, decisions)
        )
        kept_back = [d for d, rule, _ in vetoes if rule != "legal"]
        assert all(d.action not in (UNLOAD, RESET) for d in kept_back)
        if self.name == "none":
            assert kept_back == []
        self.hold_to(allowed)
        # Raises for what the lifecycle does not allow.
        self.world.obey(allowed)
        self.world.activate()
        self.stages.append((step, self.world.seeds.stage.tolist()))
        self.world.go_on()

    def changes(self, layer) -> list[int]:
        """The steps at which a stage of the layer has changed."""
        stages = [np.zeros((2, 3), int).tolist(), *(found for _, found in self.stages)]
        steps = [step for step, _ in self.stages]
        pairs = zip(steps, stages[:-1], stages[1:], strict=True)
        return [step for step, old, new in pairs if old[layer] != new[layer]]

    def hold_to(self, allowed) -> None:
        step, safety = self.world.step, self.safety
        changed = {layer: self.changes(layer) for layer in (0, 1)}
        for decision in allowed:
            if decision.action is UNLOAD:
                del self.kernels[decision.layer, decision.seed]
            else:
                assert decision.confidence >= safety.min_confidence
                self.adapted.append(step)
                assert all(step - at >= safety.cooldown_steps for at in changed[decision.layer])
                if safety.calm_steps:
                    assert all(step >= k + safety.calm_steps for k in self.world.rollbacks)
            if decision.action is not RETARGET:
                changed[decision.layer].append(step)
            if decision.action is GRAFT:
                self.kernels[decision.layer, decision.seed] = decision.kernel_id
        if safety.max_adaptations is not None:
            for end in self.adapted:
                window = [s for s in self.adapted if end - safety.interval_steps < s <= end]
                assert len(window) <= safety.max_adaptations
        if safety.max_parameters is not None:
            assert self.cost().parameters <= safety.max_parameters
        if safety.max_parameters_factor is not None:
            assert self.cost().parameters <= safety.max_parameters_factor * HOST.parameters
        if safety.max_flops is not None:
            assert self.cost().flops <= safety.max_flops
        if safety.max_flops_factor is not None:
            assert self.cost().flops <= safety.max_flops_factor * HOST.flops

    @rule(boundaries=st.integers(1, 5))
    def goes_back(self, boundaries) -> None:
        self.world.go_back(boundaries)
        step = self.world.step
        if step in self.held:
            self.kernels = self.held[step]
            self.adapted = [at for at in self.adapted if at < step]
            self.stages = [(at, found) for at, found in self.stages if at < step]


@pytest.mark.parametrize("name", sorted(SAFETIES))
def test_no_history_exceeds_a_bound(name):
    machine = type("Machine", (Machine,), {"name": name})
    machine.TestCase.settings = settings(stateful_step_count=30)
    machine.TestCase().runTest()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cooldown_steps": -1}, r"cooldown_steps of the safety rules .* at least 0, got -1"),
        ({"max_adaptations": 1.5}, r"max_adaptations .* whole number of at least 0, got 1\.5"),
        ({"interval_steps": 0}, r"interval_steps .* whole number of at least 1, got 0"),
        ({"min_confidence": 1.1}, r"min_confidence .* at least 0 and at most 1, got 1\.1"),
        ({"max_parameters": -1}, r"max_parameters .* whole number of at least 0, got -1"),
        ({"max_parameters_factor": 0.9}, r"max_parameters_factor .* at least 1, got 0\.9"),
        ({"max_flops": math.nan}, r"max_flops .* a finite number of at least 0, got nan"),
        ({"max_flops_factor": 0}, r"max_flops_factor .* at least 1, got 0"),
        ({"max_uncertainty": -0.1}, r"max_uncertainty .* at least 0, got -0\.1"),
        ({"max_loss_spread": math.inf}, r"max_loss_spread .* at least 0, got inf"),
        ({"unload_below_worth": -1}, r"unload_below_worth .* at least 0, got -1"),
        ({"judge_after_steps": 0}, r"judge_after_steps .* whole number of at least 1, got 0"),
        ({"calm_steps": "long"}, r"calm_steps .* whole number of at least 0, got 'long'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Safety(**values)

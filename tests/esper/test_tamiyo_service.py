"""Tamiyo as a plain object: news go in, decisions come out."""

import json
import re
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.contracts import (
    MAX_MESSAGE_BYTES,
    HealthSignalBatch,
    ModelReport,
    OonaMessage,
    SiteKind,
    Topic,
    explained,
)
from esper.errors import InputError
from esper.tamiyo import Action, Decision, Safety
from esper.tamiyo.graph import KINDS
from esper.tamiyo.service import (
    HealthCollector,
    LearningCounts,
    Report,
    RuleAdvisor,
    Tamiyo,
    measured_reward,
    observation_of,
    read_safety,
    seeds_now,
    was_done,
)
from tests.esper.contract_values import data_of
from tests.esper.tamiyo_reports import ACTIVE, FAILED, KERNEL, placed, report, signals


class Asks:
    """An advisor that asks for what it is told to, and remembers what it was asked about."""

    def __init__(self, *decisions):
        self.decisions = decisions
        self.asked = []

    def advise(self, news):
        self.asked.append([own.model for own in news])
        return [self.decisions for _ in news]


GRAFT = Decision(Action.GRAFT, 1, 0, "why not", KERNEL)


def tamiyo(*decisions, **options):
    advisor = Asks(*decisions)
    return Tamiyo(advisor, **options), advisor


# Reports.


def test_the_kinds_of_sites_are_those_of_the_graph():
    assert get_args(SiteKind) == KINDS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ()}, "sites: Tuple should have at least 1 item"),
        ({"kinds": ("linear",)}, "kinds has 1 rows, and there are 3 sites"),
        ({"stage": ((0, 0),) * 2}, "stage has 2 rows, and there are 3 sites"),
        ({"stage": ((),) * 3}, "a site has at least 1 seed, got 0"),
        ({"age": ((0,),) * 3}, "a row of age has 1 entries, and there are 2 seeds"),
        ({"fits": ((0, 0),) * 3}, "a row of fits has 2 entries, and there are 1 descriptions"),
        ({"fits": ((1,),) * 3}, "fits names row 1, and there are 1 kernel_ids"),
        ({"held": ((0, 3),) * 3}, "held names row 3, and there are 1 descriptions"),
        ({"kernel_flops": ()}, "kernel_flops has 0 entries, and there are 1 kernel_ids"),
        ({"depths": (0, 1, 3)}, "depths names row 3, and there are 3 sites"),
        ({"senders": (0,)}, "got 1 senders and 2 receivers"),
        ({"receivers": (1, 3)}, "receivers names row 3, and there are 3 sites"),
        ({"step": 1_001}, "step 1001 lies behind the run's last, 1000"),
        ({"train_loss": (float("nan"),)}, "train_loss.0.*finite number"),
        ({"health": ((float("nan"), 0.5),) * 3}, "health.0.0.*finite number"),
        ({"descriptions": ((0.5,), (0.5, 1.0)), "fits": ((None, None),) * 3},
         "a row of descriptions has 2 entries, and there are 1 numbers"),
    ],
)  # fmt: skip
def test_a_report_that_is_none_says_what_is_wrong(changes, message):
    with pytest.raises(ValidationError) as raised:
        report(**changes)
    assert re.search(message, explained(raised.value)), explained(raised.value)


def test_what_was_not_measured_is_null_and_nan():
    own = report(health=((None, 0.5),) * 3, worth=((0.25, None),) * 3, worth_half=0.125)
    found = Report(ModelReport.model_validate_json(own.model_dump_json()))
    assert found.data == own
    np.testing.assert_array_equal(found.health, np.float32([[np.nan, 0.5]] * 3))
    observation = observation_of(found, seeds_now(found, no_health()))
    assert observation.worth(0, 0) == (0.25, 0.125, 0.375)
    assert np.isnan(observation.worth(0, 1).value)
    assert [own.kernel_id for own in observation.candidates[2]] == [KERNEL]
    assert observation.candidates[2][0].parameter_count == 7
    assert (observation.host, observation.now) == ((100, 200.0), (100, 200.0))
    with pytest.raises(InputError, match="what site-1 sees was not reported"):
        observation.probe(1)


def no_health():
    collector = HealthCollector()
    return collector.drain(["m"])["m"]


def seen(batch, model="m"):
    collector = HealthCollector(sample=1.0)
    collector.admit(model, batch)
    return collector.drain([model])[model]


def test_seeds_are_as_they_were_seen_since_the_report():
    own = Report(report(10, stage=ACTIVE, alpha=1.0, health=0.5))
    health = seen(
        signals(3, layer_id=(0, 1, 2), seed_id=1, step=(9, 10, 11), stage=FAILED,
                error_count=(1, 2, 3), health_score=0.25)
    )  # fmt: skip
    seeds = seeds_now(own, health)
    np.testing.assert_array_equal(seeds.stage, [[2, 2], [2, 2], [2, FAILED]])
    np.testing.assert_array_equal(seeds.error_count, [[0, 1], [0, 2], [0, 3]])
    np.testing.assert_array_equal(seeds.health[:, 1], np.float32([0.5, 0.5, 0.25]))
    assert own.stage[2, 1] == ACTIVE


# Deciding.


def test_all_models_with_news_are_asked_about_in_one_call():
    own, advisor = tamiyo()
    for name in "abc":
        own.report(name, report())
    assert [advice.model for advice in own.decide(0.0)] == ["a", "b", "c"]
    assert own.decide(0.1) == []
    own.collect("b", signals(1, error_count=1))
    own.collect("c", signals(5))
    own.report("a", report(20))
    own.decide(0.2)
    assert advisor.asked == [["a", "b", "c"], ["a", "b"]]
    assert own.counts.advised == 5


def test_health_before_the_first_report_waits_for_it():
    own = Tamiyo(RuleAdvisor())
    own.collect("m", signals(4, layer_id=1, error_count=5))
    assert own.decide(0.0) == []
    own.report("m", report(stage=ACTIVE, alpha=1.0), trace_id="f" * 32)
    (advice,) = own.decide(0.1)
    assert [(d.action, d.layer, d.seed) for d in advice.decisions] == [(Action.UNLOAD, 1, 0)]
    assert (advice.model, advice.step, advice.shadow, advice.trace_id) == (
        "m", 10, False, "f" * 32,
    )  # fmt: skip


def test_a_place_is_left_alone_until_its_model_reports_again():
    own, _ = tamiyo(GRAFT)
    own.report("m", report())
    assert own.decide(0.0)[0].decisions == (GRAFT,)
    own.collect("m", signals(1, error_count=1))
    assert own.decide(0.1)[0].decisions == ()
    assert own.counts.repeated == 1
    own.report("m", report(20))
    assert own.decide(0.2)[0].decisions == (GRAFT,)
    assert own.counts.decisions == {"graft": 2}


def test_every_decision_passes_the_model_s_own_guard_and_vetoes_are_counted():
    own, _ = tamiyo(GRAFT, safety=Safety(max_adaptations=1, max_parameters=107))
    for name in "ab":
        own.report(name, report())
    assert [advice.decisions for advice in own.decide(0.0)] == [(GRAFT,)] * 2
    own.report("a", report(20))
    own.report("b", report(20, parameters=101))
    vetoes = [advice.vetoes[0] for advice in own.decide(0.1)]
    assert [(veto.decision, veto.rule) for veto in vetoes] == [(GRAFT, "rate")] * 2
    assert own.counts.vetoes == {"rate": 2}
    later, _ = tamiyo(GRAFT, safety=Safety(max_parameters=106))
    later.report("a", report())
    ((veto,),) = (advice.vetoes for advice in later.decide(0.0))
    assert veto.rule == "parameters"
    assert "no more than 106 may be" in veto.reason


def test_decisions_and_signals_about_places_that_there_are_not_are_counted():
    own, _ = tamiyo(
        Decision(Action.UNLOAD, 3, 0, ""), Decision(Action.UNLOAD, 0, 2, ""),
        Decision(Action.UNLOAD, -1, 0, ""),
    )  # fmt: skip
    own.report("m", report(stage=ACTIVE))
    own.collect("m", signals(4, layer_id=(0, 3, 1, 9), seed_id=(1, 0, 2, 0), error_count=1))
    (advice,) = own.decide(0.0)
    assert advice.decisions == advice.vetoes == ()
    assert (own.counts.stray, own.counts.strange) == (3, 3)


def test_an_advisor_that_fails_for_one_model_keeps_no_other_from_advice():
    class Picky(Asks):
        def advise(self, news):
            if any(own.model == "b" for own in news):
                raise ZeroDivisionError("by b")
            return super().advise(news)

    own = Tamiyo(Picky(GRAFT))
    for name in "abc":
        own.report(name, report())
    assert [advice.decisions for advice in own.decide(0.0)] == [(GRAFT,), (), (GRAFT,)]
    assert own.counts.failures == {"advisor": 2}
    assert own.counts.last_error == "advisor: ZeroDivisionError: by b"


def test_what_an_advisor_cannot_say_yet_it_is_asked_again():
    class Slow(Asks):
        def advise(self, news):
            heard = [int(own.health["faulty"].sum()) for own in news]
            self.asked.append((heard, [own.fresh for own in news]))
            return [None if len(self.asked) < 3 else [GRAFT]] * len(news)

    slow = Slow()
    own = Tamiyo(slow)
    own.report("m", report())
    own.collect("m", signals(2, error_count=1, step=(1, 2)))
    assert own.decide(0.0) == []
    own.collect("m", signals(1, error_count=2, step=(3,)))
    assert own.decide(0.1) == []
    assert own.decide(0.2)[0].decisions == (GRAFT,)
    assert own.decide(0.3) == []
    assert slow.asked == [([2], [True]), ([3], [True]), ([3], [True])]
    assert own.counts.postponed == 2


def test_an_advisor_answers_for_each_model():
    class Short(Asks):
        def advise(self, news):
            return [()] * (len(news) - 1) if len(news) > 1 else [()]

    own = Tamiyo(Short())
    own.report("a", report())
    own.report("b", report())
    assert len(own.decide(0.0)) == 2
    assert "asked about 2 and answered for 1" in own.counts.last_error


def test_rules_of_safety_are_read_from_a_file(tmp_path):
    path = tmp_path / "safety.yaml"
    path.write_text("cooldown_steps: 5\nmin_confidence: 0.5\n")
    assert read_safety(path) == Safety(cooldown_steps=5, min_confidence=0.5)
    for text, message in {
        "cooldown_stepz: 5": r"safety.yaml does not take 'cooldown_stepz'.*mean 'cooldown_steps'",
        "min_confidence: 2": "min_confidence of the safety rules must be .* at most 1, got 2",
        "cooldown_steps: [": "safety.yaml is not YAML: while parsing",
        "- 5": "is to be a mapping such as `cooldown_steps: 100`, and holds list",
        "": "and holds NoneType",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_safety(path)
    with pytest.raises(InputError, match=r"none.yaml cannot be read: No such file"):
        read_safety(tmp_path / "none.yaml")


# Models that come and go.


def test_another_network_under_a_name_begins_anew():
    own, _ = tamiyo(GRAFT, safety=Safety(cooldown_steps=500))
    own.report("m", report())
    assert own.decide(0.0)[0].decisions == (GRAFT,)
    own.report("m", report(20, count=4))
    assert own.decide(0.1)[0].decisions == (GRAFT,)
    assert own.counts.replaced == 1


def test_a_run_that_went_back_has_no_later_reports():
    seen = []

    class Looks(Asks):
        def advise(self, news):
            seen.append([own.data.step for own in news[0].reports])
            return [()]

    own = Tamiyo(Looks(), reports=3)
    for step in (10, 20, 30, 40, 20, 30):
        own.report("m", report(step))
        own.decide(float(step))
    assert seen == [[10], [20, 10], [30, 20, 10], [40, 30, 20], [20], [30, 20]]


def test_a_model_of_which_nothing_is_heard_is_forgotten():
    own, _ = tamiyo(forget_seconds=10.0)
    own.report("m", report())
    own.collect("silent", signals(2, error_count=1))
    own.decide(0.0)
    own.report("m", report(20))
    own.decide(8.0)
    assert own.counts.forgotten == 0
    own.decide(10.5)
    assert (own.counts.forgotten, own.models) == (1, 1)
    assert own.collector.outcomes.forgotten == 2
    own.decide(18.5)
    assert own.models == 0


@pytest.mark.parametrize("after", [1.0, 20.0], ids=["looked_after", "forgotten"])
def test_a_model_that_was_silent_for_long_is_under_the_same_rules(after):
    safety = Safety(max_adaptations=1, interval_steps=10_000)
    own, _ = tamiyo(GRAFT, safety=safety, forget_seconds=10.0)
    own.report("m", report())
    assert own.decide(0.0)[0].decisions == (GRAFT,)
    own.decide(after)
    own.report("m", report(20))
    (advice,) = own.decide(after + 1.0)
    assert [veto.rule for veto in advice.vetoes] == ["rate"]
    own.report("m", report(20, count=4))
    assert own.decide(after + 2.0)[0].decisions == (GRAFT,), "another network of that name"


def test_of_models_that_come_no_more_not_all_are_remembered():
    own, _ = tamiyo(forget_seconds=1.0, most_models=2)
    for index in range(20):
        own.report(f"m{index}", report())
        own.decide(2.0 * index)
    assert own.counts.forgotten == 19
    assert list(own._guards) == [f"m{index}" for index in range(11, 19)]


def test_one_model_more_than_are_looked_after_is_refused():
    own, _ = tamiyo(most_models=2)
    own.report("a", report())
    own.collect("b", signals(1))
    for call in (lambda: own.report("c", report()), lambda: own.collect("c", signals(1))):
        with pytest.raises(InputError, match=r"2 models are looked after.*'c' would be one more"):
            call()
    own.report("b", report())


# Rules.


def _rules(past, health=None, **options):
    own = Tamiyo(RuleAdvisor(**options))
    if health is not None:
        own.collect("m", health)
    for each in past:
        own.report("m", each)
    ((advice),) = own.decide(0.0)
    return [(d.action, d.layer, d.seed, d.reason) for d in advice.decisions]


def test_a_seed_that_fails_is_unloaded_and_one_that_has_failed_is_reset():
    stage = placed(FAILED, (2, 1), ACTIVE)
    health = signals(3, layer_id=(0, 1, 2), seed_id=(0, 1, 1), step=0, error_count=(2, 3, 3))
    assert _rules([report(stage=stage)], health) == [
        (Action.RESET, 2, 1, "its output was not finite 3 times in a row"),
        (Action.UNLOAD, 1, 1, "it failed 3 times in a row, and 3 are too many"),
    ]
    assert _rules([report(stage=0)], health) == []


def test_a_seed_that_stays_ill_is_unloaded():
    ill = [report(step, stage=ACTIVE, health=placed(0.1, (1, 0), 0.9)) for step in (10, 20, 30)]
    assert _rules(ill) == [
        (Action.UNLOAD, 1, 0, "its health is 0.1, and was below 0.2 in the last 3 reports")
    ]
    assert _rules(ill[:2]) == []
    assert _rules(ill, least_health=0.1) == []
    well = report(20, stage=ACTIVE, health=0.9)
    assert _rules([ill[0], well, ill[2]]) == []
    unmeasured = report(20, stage=ACTIVE)
    assert _rules([ill[0], unmeasured, ill[2]]) == []


@pytest.mark.parametrize(
    "options", [{"errors": 0}, {"least_health": 2.0}, {"reports": 0}], ids=str
)  # fmt: skip
def test_rules_refuse_values_out_of_range(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} of a rule advisor must be"):
        RuleAdvisor(**options)


# Learning.


class Notes:
    def __init__(self):
        self.updates = []
        self.counts = LearningCounts()

    def update(self, experiences, seconds):
        self.updates.append((experiences, seconds))


def test_learning_is_off_and_on_only_with_somebody_who_learns():
    own, _ = tamiyo(learner=Notes())
    own.report("m", report())
    own.decide(0.0)
    own.report("m", report(20))
    own.learn(1.0)
    assert not own.learning
    assert own.counts.experiences == 0
    with pytest.raises(InputError, match="learning is switched on, and there is nobody who learns"):
        tamiyo(learn=True)
    with pytest.raises(InputError, match="in shadow nothing is done, so there is nothing to learn"):
        tamiyo(learn=True, learner=Notes(), shadow=True)


def test_what_came_of_decisions_is_an_experience():
    learner = Notes()
    own, _ = tamiyo(GRAFT, learn=True, learner=learner, price=0.5)
    own.report("m", report(10, validation_loss=(1.5,)))
    own.decide(0.0)
    grown = report(20, stage=placed(ACTIVE, (1, 0), 0), validation_loss=(1.0,), parameters=110)
    own.report("m", grown)
    own.learn(0.02)
    ((experiences, seconds),) = learner.updates
    assert seconds == 0.02
    (found,) = experiences
    assert (found.model, found.decisions) == ("m", (GRAFT,))
    assert (found.before.data.step, found.after.data) == (10, grown)
    # (1.5 - 1.0) / 2.0 less half of the 0.1 of the host that was added.
    assert found.reward == pytest.approx(0.25 - 0.05)
    own.learn(0.01)
    assert learner.updates[1] == ((), 0.01)
    own.learn(0.0)
    assert len(learner.updates) == 2


def test_nothing_is_learned_from_what_was_not_done_or_not_measured():
    own, _ = tamiyo(GRAFT, learn=True, learner=Notes(), most_experiences=1)
    own.report("m", report(10))
    own.decide(0.0)
    own.report("m", report(20))
    assert own.counts.not_done == 1
    quiet, _ = tamiyo(learn=True, learner=Notes(), most_experiences=1)
    for step in (10, 20, 30, 30, 40):
        loss = None if step == 20 else 1.0
        quiet.report("m", report(step, validation_loss=(loss,)))
        quiet.decide(float(step))
    counts = quiet.counts
    # 10 to 20 and 20 to 30 lack a loss, 30 again is no later boundary, 30 to 40 is one.
    assert (counts.unmeasured, counts.experiences, counts.lost_experiences) == (2, 1, 0)
    quiet.report("m", report(50))
    assert counts.lost_experiences == 1


def grown(step, *places):
    stage = [[0, 0] for _ in range(3)]
    for layer, seed in places:
        stage[layer][seed] = ACTIVE
    return report(step, stage=tuple(map(tuple, stage)))


def test_what_a_run_does_a_boundary_later_is_credited_there():
    # It reports, and then does what it was asked for at the boundary before.
    own, advisor = tamiyo(GRAFT, learn=True, learner=Notes())
    for step, places in ((10, ()), (20, ()), (30, [(1, 0)]), (40, [(1, 0)])):
        own.report("m", grown(step, *places))
        own.decide(float(step))
        advisor.decisions = ()
    assert (own.counts.not_done, own.counts.unasked) == (1, 0)
    found = [(each.before.data.step, each.decisions) for each in own._experiences]
    assert found == [(20, (GRAFT,)), (30, ())]


def test_what_nobody_asked_for_teaches_nothing():
    own, _ = tamiyo(learn=True, learner=Notes())
    own.report("m", grown(10))
    own.decide(0.0)
    # The run's own guard, or its user, did it.
    own.report("m", grown(20, (1, 0)))
    own.decide(1.0)
    assert (own.counts.unasked, own.counts.experiences) == (1, 0)
    # What fails by itself is what came of waiting.
    own.report("m", report(30, stage=placed(FAILED, (1, 0), 0)))
    assert (own.counts.unasked, own.counts.experiences) == (1, 1)
    assert own._experiences[0].decisions == ()


def test_what_was_asked_for_long_ago_is_not_credited():
    own, advisor = tamiyo(GRAFT, learn=True, learner=Notes())
    for step, places in ((10, ()), (20, ()), (30, ()), (40, [(1, 0)])):
        own.report("m", grown(step, *places))
        own.decide(float(step))
        advisor.decisions = ()
    assert own.counts.unasked == 1
    assert [each.before.data.step for each in own._experiences] == [20]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("unload", 1, 0), "asks for what is a Decision; it asked for a tuple"),
        (None, "asks for what is a Decision; it asked for a NoneType"),
        (Decision("unload", 1, 0, ""), "action of a decision is an Action; .* 'unload', a str"),
        (Decision(Action.UNLOAD, 1.0, 0, ""), "layer of a decision is a whole number; .* 1.0"),
        (Decision(Action.RETARGET, 1, 0, "", alpha="1"), "alpha of a decision is a number"),
        (Decision(Action.RETARGET, 1, 0, "", confidence=None), "confidence of a decision is a"),
    ],
    ids=str,
)
def test_what_is_no_decision_costs_its_own_model_and_no_other(wrong, message):
    class Errs:
        def advise(self, news):
            return [[wrong] if own.model == "odd" else [GRAFT] for own in news]

    own = Tamiyo(Errs())
    for model in ("odd", "even"):
        own.report(model, report())
    found = {advice.model: advice.decisions for advice in own.decide(0.0)}
    assert found == {"odd": (), "even": (GRAFT,)}
    assert re.search(message, own.counts.last_error), own.counts.last_error


def test_a_learner_that_fails_is_counted():
    class Fails(Notes):
        def update(self, experiences, seconds):
            raise FloatingPointError("nan")

    own, _ = tamiyo(learn=True, learner=Fails())
    own.learn(1.0)
    assert own.counts.failures == {"learner": 1}
    assert own.counts.last_error == "learner: FloatingPointError: nan"


@pytest.mark.parametrize(
    ("action", "stages"),
    [(Action.GRAFT, {1, 2}), (Action.UNLOAD, {0}), (Action.RESET, {0}), (Action.FOSSILIZE, {4}),
     (Action.RETARGET, {2})],
)  # fmt: skip
def test_what_was_done_shows_in_the_next_report(action, stages):
    decision = Decision(action, 1, 0, "")
    shown = {own for own in range(5) if was_done(decision, Report(report(stage=own)))}
    assert shown == stages


def test_the_reward_is_antisymmetric_and_unknown_where_a_loss_is():
    first = Report(report(validation_loss=(1.5,), parameters=130))
    second = Report(report(validation_loss=(0.5,)))
    there = measured_reward(first, second, price=0.1)
    back = measured_reward(second, first, price=0.1)
    assert there is not None
    assert back is not None
    assert there == pytest.approx(0.5 + 0.03)
    assert there == -back
    assert measured_reward(first, Report(report(validation_loss=(None,)))) is None
    assert measured_reward(Report(report(first_loss=0.0)), second) is None


@pytest.mark.parametrize(
    "options",
    [{"reports": 0}, {"most_models": 0}, {"most_experiences": 0}, {"forget_seconds": -1.0},
     {"price": -0.5}],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} of Tamiyo must be"):
        tamiyo(**options)


def test_a_report_of_a_thousand_sites_is_one_message():
    data = report(
        count=1_000, seeds=4, stage=ACTIVE, alpha=0.123456, health=0.98765, worth=0.012345,
        health_before=0.87654, worth_half=0.001234, age=12, held=0,
    ).model_dump(mode="json")  # fmt: skip
    message = OonaMessage(topic=Topic.MODEL_REPORT, key="m", sender_id="m", payload=data)
    assert len(message.to_bytes()) < MAX_MESSAGE_BYTES // 2
    assert json.loads(message.to_bytes())["payload"]["steps"] == 1_000


@given(st.lists(data_of(ModelReport), min_size=1, max_size=3), data_of(HealthSignalBatch))
@settings(max_examples=40)
def test_whatever_a_contract_allows_is_decided_upon(reports, health):
    own = Tamiyo(RuleAdvisor(), learn=True, learner=Notes())
    for now, each in enumerate(reports):
        own.report("m", each)
        own.collect("m", health)
        (advice,) = own.decide(float(now))
        assert advice.step == each.step
        for decision in advice.decisions:
            assert decision.layer < len(each.sites)
            assert decision.seed < each.seeds
    assert own.counts.failures == {}

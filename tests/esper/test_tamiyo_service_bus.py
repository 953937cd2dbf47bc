"""Tamiyo on a bus: what it hears, what it tells, and what if something is wrong."""

import json
import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from esper.contracts import (
    AdaptationDecision,
    AdaptationDecisionBatch,
    HealthSignalBatch,
    OonaMessage,
    Topic,
    payload_of,
)
from esper.errors import InputError, LeaseLostError, ServiceUnavailableError
from esper.oona import MemoryBroker
from esper.oona._memory import MemoryBroker as Stored
from esper.oona._store import Record, partition_of
from esper.tamiyo import Action, Decision
from esper.tamiyo.service import (
    GROUP,
    SHADOW_GROUP,
    HealthCollector,
    LearningCounts,
    RuleAdvisor,
    Tamiyo,
    TamiyoService,
    Ticks,
)
from esper.tamiyo.service._metrics import health_of, metrics_text
from tests.esper.oona_brokers import Clock
from tests.esper.tamiyo_reports import ACTIVE, report, signals

HEALTH_TOPIC, REPORTS = Topic.SEED_HEALTH, Topic.MODEL_REPORT


def said(topic, payload, model="run-1", **more):
    return OonaMessage(topic=topic, key=model, sender_id="tolaria", payload=payload, **more)


def reported(step=10, model="run-1", **changes):
    own = report(step, **({"stage": ACTIVE, "alpha": 1.0, "health": 0.9} | changes))
    return said(REPORTS, own.model_dump(mode="json"), model)


def ill(count=3, model="run-1", **columns):
    batch = signals(count, **({"layer_id": 1, "error_count": 4} | columns))
    return said(HEALTH_TOPIC, batch.model_dump(mode="json"), model)


class Scene:
    """A bus in memory, a service on it, and one who reads what it tells."""

    def __init__(self, *, advisor=None, broker=None, **options):
        self.clock = Clock()
        self.broker = broker or MemoryBroker()
        self.options = options
        self.advisor = advisor or RuleAdvisor()
        self.told = self.broker.consumer("readers", [Topic.DECISION, Topic.ADVICE])
        self.service = self.make()
        # The group is there from now on.
        self.service.collect()

    def make(self):
        tamiyo = Tamiyo(self.advisor, collector=HealthCollector(sample=1.0), **self.options)
        return TamiyoService(tamiyo, self.broker, clock=self.clock)

    def turn(self):
        self.service.collect()
        self.clock.advance(0.1)
        self.service.decide()
        found = self.told.receive()
        self.told.acknowledge(found)
        return [each.message for each in found]

    def letters(self):
        return [letter.reason for letter in self.broker.dead_letters()]

    def settled(self, group=GROUP):
        found = self.broker.statistics()
        return all(
            found.group(group, topic).lag == found.group(group, topic).pending == 0
            for topic in (HEALTH_TOPIC, REPORTS)
        )


@pytest.fixture
def scene():
    return Scene()


# What it hears, and tells.


def test_a_decision_names_its_model_and_the_report_that_it_is_about(scene):
    own = reported()
    scene.broker.publish([own, ill()])
    (message,) = scene.turn()
    assert (message.topic, message.key, message.trace_id) == (
        Topic.DECISION, "run-1", own.message_id,
    )  # fmt: skip
    decision = payload_of(message)
    assert isinstance(decision, AdaptationDecision)
    assert (decision.step, decision.action, decision.layer, decision.seed) == (
        10, Action.UNLOAD, 1, 0,
    )  # fmt: skip
    assert "failed 4 times in a row" in decision.reason
    assert scene.settled()
    assert scene.turn() == []


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_each_report_is_answered_by_one_message(asked):
    class Advisor:
        def advise(self, news):
            own = [Decision(Action.UNLOAD, 1, seed, "it is bad") for seed in range(asked)]
            return [own if each.fresh else () for each in news]

    scene = Scene(advisor=Advisor())
    own = reported()
    scene.broker.publish([own])
    (message,) = scene.turn()
    assert message.trace_id == own.message_id
    payload = payload_of(message)
    items = payload.items() if isinstance(payload, AdaptationDecisionBatch) else [payload]
    assert [item.seed for item in items] == list(range(asked))
    # Health that must pass is looked at once more, and there is nothing new to say.
    scene.broker.publish([ill()])
    assert scene.turn() == []


def test_what_is_put_off_is_heard_again_by_who_comes_after():
    class Later:
        ready = False

        def advise(self, news):
            return [() if self.ready or own.model == "run-2" else None for own in news]

    advisor = Later()
    scene = Scene(advisor=advisor)
    scene.broker.publish([reported(), reported(model="run-2")])
    assert [message.key for message in scene.turn()] == ["run-2"]
    assert scene.broker.statistics().group(GROUP, REPORTS).pending == 1
    scene.service = scene.make()
    advisor.ready = True
    assert [message.key for message in scene.turn()] == ["run-1"]
    assert scene.settled()


def test_of_an_answer_that_is_larger_than_a_message_the_first_half_is_told():
    class Talks:
        def advise(self, news):
            wordy = [Decision(Action.UNLOAD, layer, 0, "x" * 500_000) for layer in range(3)]
            return [wordy if own.model == "run-1" else () for own in news]

    scene = Scene(advisor=Talks())
    scene.broker.publish([reported(), reported(model="run-2")])
    found = {message.key: payload_of(message) for message in scene.turn()}
    assert found["run-1"].layer == 0
    assert found["run-2"].items() == []
    assert scene.service.traffic.unwritable == 2
    assert scene.service.healthy
    assert scene.settled()


def test_in_shadow_a_report_is_not_answered_where_nothing_is_asked_for():
    scene = Scene(shadow=True)
    scene.broker.publish([reported()])
    assert scene.turn() == []
    assert scene.settled(SHADOW_GROUP)


def test_models_are_told_apart_by_key_or_else_by_sender(scene):
    one = reported(model="a")
    other = OonaMessage(
        topic=REPORTS, sender_id="b", payload=dict(reported().payload)
    )  # fmt: skip
    health = OonaMessage(topic=HEALTH_TOPIC, sender_id="b", payload=dict(ill().payload))
    scene.broker.publish([one, other, health, ill(model="a", layer_id=2)])
    found = {message.key: payload_of(message).layer for message in scene.turn()}
    assert found == {"a": 2, "b": 1}


def test_a_single_signal_and_a_batch_are_heard_alike(scene):
    item = HealthSignalBatch.model_validate_json(json.dumps(ill(1).payload)).items()[0]
    scene.broker.publish([reported(), said(HEALTH_TOPIC, item.model_dump(mode="json"))])
    assert len(scene.turn()) == 1


def test_in_shadow_it_hears_all_that_the_other_hears_and_nobody_acts_on_what_it_tells(scene):
    shadow = TamiyoService(Tamiyo(RuleAdvisor(), shadow=True), scene.broker, clock=scene.clock)
    shadow.collect()
    scene.broker.publish([reported(), ill()])
    shadow.collect()
    shadow.decide()
    (advice,) = scene.told.receive()
    assert advice.message.topic is Topic.ADVICE
    assert payload_of(advice.message).action is Action.UNLOAD
    scene.told.acknowledge([advice])
    assert scene.settled(SHADOW_GROUP)
    assert not scene.settled()
    (decision,) = scene.turn()
    assert decision.topic is Topic.DECISION
    assert decision.payload == advice.message.payload


def test_what_there_is_no_time_for_is_left_for_the_next_turn(scene):
    scene.broker.publish([reported(), *(ill(1) for _ in range(100))])

    def slow():
        scene.clock.advance(0.001)
        return scene.clock.now

    scene.service._clock = slow
    scene.service.collect()
    taken = scene.service.tamiyo.collector.outcomes.received
    assert 0 < taken < 100
    for _ in range(20):
        scene.service.collect()
    assert scene.service.tamiyo.collector.outcomes.received == 100


# What is no use.


def test_bad_input_is_a_dead_letter_with_its_reason_and_stops_nothing(scene):
    payload = dict(ill().payload)
    nothing = {**reported().payload, "sites": []}
    scene.broker.publish(
        [
            said(HEALTH_TOPIC, {**payload, "health_score": [1.5, 0.1, 0.1]}),
            said(HEALTH_TOPIC, {**payload, "schema_version": 9}),
            said(REPORTS, nothing, "no-sites"),
            said(REPORTS, {"what": 1}, "no-report"),
        ]
    )
    good = said(HEALTH_TOPIC, {**payload, "health_score": ["x"]})
    body = good.to_bytes().replace(b'["x"]', b"[NaN,0.1,0.1]")
    store = scene.broker
    assert isinstance(store, Stored)
    partition = partition_of("run-1", store._store.partitions)
    store._store.append([Record(HEALTH_TOPIC, partition, "f" * 32, body)])
    scene.broker.publish([reported(), ill()])
    assert len(scene.turn()) == 1
    reasons = "\n".join(scene.letters())
    for part in (
        "about telemetry.seed.health from 'tolaria' holds no HealthSignalBatch: health_score.0",
        "HealthSignalBatch has schema version 9, and this version of Esper knows it up to 1",
        "holds no ModelReport: sites: Tuple should have at least 1 item",
        "holds no ModelReport: step: Field required",
        "it cannot be read: this is no message: it is no JSON",
    ):
        assert part in reasons, reasons
    assert len(scene.letters()) == 5
    traffic = scene.service.traffic
    assert (traffic.received, traffic.malformed, traffic.newer, traffic.refused) == (6, 3, 1, 0)
    assert scene.settled()


def test_health_of_a_model_that_never_reported_is_kept_and_then_forgotten(scene):
    scene.broker.publish([ill(model="unknown")])
    assert scene.turn() == []
    assert len(scene.service.tamiyo.collector) == 3
    assert health_of(scene.service)["held"] == 3
    scene.clock.advance(7 * 3_600.0)
    scene.turn()
    assert len(scene.service.tamiyo.collector) == 0
    assert scene.service.tamiyo.collector.outcomes.forgotten == 3


def test_more_models_than_are_looked_after_are_refused():
    scene = Scene(most_models=1)
    scene.broker.publish([reported(model="a")])
    scene.turn()
    scene.broker.publish([reported(model="b"), ill(model="a")])
    assert len(scene.turn()) == 1
    assert "1 models are looked after" in scene.letters()[0]
    assert scene.service.traffic.refused == 1


def test_a_decision_that_is_no_message_is_counted():
    class Odd:
        def advise(self, news):
            return [[Decision(Action.UNLOAD, 0, 0, "", confidence=math.nan),
                     Decision(Action.UNLOAD, 1, 0, "\ud800"),
                     Decision(Action.UNLOAD, 2, 0, "fine")]] * len(news)  # fmt: skip

    scene = Scene(advisor=Odd())
    scene.broker.publish([reported()])
    (message,) = scene.turn()
    assert message.payload["reason"] == "fine"
    assert scene.service.traffic.unwritable == 2


# What goes away.


class Shaky:
    """A bus that is away when a test says so."""

    def __init__(self, broker):
        self.broker = broker
        self.away = False

    def publish(self, messages):
        self._check()
        self.broker.publish(messages)

    def consumer(self, *args, **options):
        self._check()
        return self.broker.consumer(*args, **options)

    def dead_letters(self):
        return self.broker.dead_letters()

    def statistics(self):
        return self.broker.statistics()

    def _check(self):
        if self.away:
            raise ServiceUnavailableError("the bus is away")


def test_what_was_decided_while_the_bus_was_away_is_told_when_it_is_back():
    bus = Shaky(MemoryBroker())
    scene = Scene(broker=bus)
    bus.broker.publish([reported(), ill()])
    bus.away = True
    assert scene.turn() == []
    assert not scene.settled()
    assert health_of(scene.service)["status"] == "failed"
    assert "publishing: the bus is away" in health_of(scene.service)["bus"]
    bus.away = False
    scene.clock.advance(10.0)
    assert len(scene.turn()) == 1
    assert scene.settled()
    assert health_of(scene.service)["status"] == "ok"
    assert scene.service.traffic.published == 1


def test_a_bus_that_is_not_there_at_the_beginning_is_asked_again():
    bus = Shaky(MemoryBroker())
    bus.away = True
    service = TamiyoService(Tamiyo(RuleAdvisor()), bus, clock=(clock := Clock()))  # pyright: ignore[reportArgumentType]
    for _ in range(5):
        service.collect()
        service.decide()
    # It is not asked with each turn.
    assert service.traffic.away == 1
    bus.away = False
    clock.advance(1.0)
    service.collect()
    assert service.healthy


def test_what_a_killed_service_had_heard_is_heard_again():
    scene = Scene()
    scene.broker.publish([reported(), ill()])
    scene.service.collect()
    assert len(scene.service.tamiyo.collector) == 3
    # It goes without a word, and another one is started in its place.
    killed, scene.service = scene.service, scene.make()
    assert len(scene.turn()) == 1
    assert scene.settled()
    with pytest.raises(LeaseLostError, match="another consumer was started as 'tamiyo'"):
        killed.collect()


# How it runs.


def test_run_ends_when_it_is_told_to_and_decides_upon_what_was_heard():
    scene = Scene()
    scene.broker.publish([reported(), ill()])
    scene.service.collect()
    scene.service.stop()
    scene.service.run()
    assert len(scene.told.receive()) == 1
    assert scene.settled()


def test_a_learner_has_the_time_until_the_next_turn():
    class Times:
        def __init__(self):
            self.seconds = []
            self.counts = LearningCounts(updates=3, refused={"several": 2}, kl=0.25)

        def update(self, experiences, seconds):
            self.seconds.append(seconds)

    learner = Times()
    scene = Scene(learn=True, learner=learner)
    scene.clock.advance(0.2)
    scene.service.collect()
    scene.clock.advance(0.01)
    scene.service.decide()
    assert learner.seconds == [pytest.approx(0.04)]
    text = metrics_text(scene.service).decode()
    assert 'esper_tamiyo_updates_total{outcome="made"} 3.0' in text
    assert 'esper_tamiyo_experiences_total{outcome="several"} 2.0' in text
    assert "esper_tamiyo_learning_kl 0.25" in text


def test_turns_keep_their_times_and_what_was_missed_is_not_made_up_for():
    ticks = Ticks(0.1, window=4)
    now, begun = 0.0, []
    while now < 1.0:
        if ticks.is_due(now):
            ticks.begin(now)
            begun.append(now)
            now += 0.25 if len(begun) == 3 else 0.01
            ticks.end(0.25 if len(begun) == 3 else 0.01)
        now += ticks.wait(now)
    # The third took so long that two more were due meanwhile.
    assert begun == pytest.approx([0.0, 0.1, 0.2, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95])
    assert (ticks.count, ticks.late, ticks.slowest) == (9, 1, 0.25)
    assert ticks.quantile(1.0) == 0.01
    assert Ticks(0.1).quantile(0.5) == 0.0


@pytest.mark.parametrize("name", ["collect_seconds", "decide_seconds"])
def test_times_that_cannot_be_are_refused(name):
    with pytest.raises(InputError, match=f"{name} of the service must be"):
        TamiyoService(Tamiyo(RuleAdvisor()), MemoryBroker(), **{name: 0.0})


def test_metrics_say_what_was_counted(scene):
    scene.broker.publish([reported(), ill(), said(REPORTS, {"what": 1})])
    scene.turn()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics_text(scene.service).decode())
        for sample in family.samples
    }
    for key, value in {
        ("esper_tamiyo_signals_total", "must_pass"): 3,
        ("esper_tamiyo_signals_total", "received"): 3,
        ("esper_tamiyo_messages_total", "received"): 3,
        ("esper_tamiyo_messages_total", "malformed"): 1,
        ("esper_tamiyo_decisions_total", "unload"): 1,
        ("esper_tamiyo_events_total", "reports"): 1,
        ("esper_tamiyo_models",): 1,
        ("esper_tamiyo_healthy",): 1,
        ("esper_tamiyo_shadow",): 0,
        ("esper_tamiyo_ticks_total", "decide"): 1,
    }.items():
        assert found[key] == value, key
    assert ("esper_tamiyo_tick_seconds", "0.95", "decide") in found

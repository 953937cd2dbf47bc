"""What a run hears of a service: what it takes, what it leaves out, and what if nobody is there."""

import threading

import numpy as np
import pytest

from esper.contracts import (
    AdaptationDecision,
    AdaptationDecisionBatch,
    HealthSignalBatch,
    ModelReport,
    OonaMessage,
    Topic,
    payload_of,
)
from esper.errors import EsperError, InputError
from esper.oona import MemoryBroker, SqliteBroker, check_bus_url, open_broker
from esper.tamiyo import Action, Decision, Guard, Safety, ServiceController, Worth, make_controller
from esper.tamiyo.service import Tamiyo
from esper_functional import Event, EventKind, apply_event, init_seeds
from tests.esper.controlled import A, B, C, hold, observe
from tests.esper.oona_brokers import Clock
from tests.esper.service_runs import Prompt, Scripted, first_kernel, serving

NAME = "runs/one"


class Desk:
    """A run of one layer with two seeds, and one who reads and writes what a service would."""

    def __init__(self, **options):
        self.broker = MemoryBroker()
        self.heard = self.broker.consumer("test", [Topic.SEED_HEALTH, Topic.MODEL_REPORT])
        self.controller = ServiceController(bus=self.broker, name=NAME, **options)
        self.step = 0

    def boundary(self, seeds=None, **more):
        """The decisions of the next boundary, and what was reported there."""
        self.step += 50
        decisions = self.controller.decide(observe(self.step, seeds=seeds, **more))
        found = [each.message for each in self.heard.receive()]
        return decisions, found

    def say(self, payload, about, *, topic=Topic.DECISION, key=NAME):
        dumped = payload if isinstance(payload, dict) else payload.model_dump(mode="json")
        message = OonaMessage(
            topic=topic, key=key, sender_id="tamiyo", trace_id=about, payload=dumped
        )
        self.broker.publish([message])

    @property
    def notes(self):
        return list(self.controller.remarks())


@pytest.fixture
def desk():
    own = Desk()
    yield own
    own.controller.close()


def graft(step=50, layer=0, seed=0, kernel=A, **more):
    return AdaptationDecision(
        step=step, action=Action.GRAFT, layer=layer, seed=seed, kernel_id=kernel.kernel_id, **more
    )


def test_a_boundary_reports_the_model_and_the_health_of_seeds_that_hold_a_kernel(desk):
    decisions, (message,) = desk.boundary()
    assert decisions == []
    assert (message.topic, message.key, message.sender_id) == (Topic.MODEL_REPORT, NAME, NAME)
    report = payload_of(message)
    assert isinstance(report, ModelReport)
    assert (report.step, report.sites, report.seeds) == (50, ("layers.0",), 2)
    assert set(report.kernel_ids) <= {A.kernel_id, B.kernel_id, C.kernel_id}
    seeds = hold((0, 1)).replace(error_count=np.array([[0, 2]], np.int32))
    _, found = desk.boundary(seeds)
    assert [own.topic for own in found] == [Topic.SEED_HEALTH, Topic.MODEL_REPORT]
    health = payload_of(found[0])
    assert isinstance(health, HealthSignalBatch)
    assert (health.layer_id, health.seed_id, health.step) == ((0,), (1,), (100,))
    assert (health.stage, health.error_count, health.health_score) == ((2,), (2,), (1.0,))


def test_what_came_since_is_taken_at_the_next_boundary_as_it_was_said(desk):
    _, (report,) = desk.boundary()
    said = graft(
        alpha=0.5, reason="why", initialisation="zero_output", confidence=0.75, uncertainty=0.1,
        effect=(0.1, -0.2, 0.7), features=(("progress", 0.25),),
    )  # fmt: skip
    desk.say(said, report.message_id)
    decisions, _ = desk.boundary()
    (decision,) = decisions
    assert decision == Decision(
        Action.GRAFT, 0, 0, "why", A.kernel_id, "zero_output", 0.5, 0.75, 0.1,
        Worth(0.1, -0.2, 0.7), (("progress", 0.25),),
    )  # fmt: skip
    assert desk.boundary()[0] == []
    assert desk.notes == []


def test_what_was_said_of_an_older_report_is_taken_if_it_is_legal_now(desk):
    _, (first,) = desk.boundary()
    desk.boundary()
    desk.say(graft(seed=0), first.message_id)
    desk.say(graft(seed=1), first.message_id)
    decisions, _ = desk.boundary(seeds=hold((0, 0)))
    assert [own.seed for own in decisions] == [0, 1]
    review = Guard(Safety()).review(observe(200, seeds=hold((0, 0))), decisions)
    assert [own.seed for own in review[0]] == [1]
    assert [veto.rule for veto in review[1]] == ["legal"]


def test_batches_are_taken_in_their_order(desk):
    _, (report,) = desk.boundary()
    desk.say(AdaptationDecisionBatch.of([graft(seed=1), graft(seed=0)]), report.message_id)
    assert [own.seed for own in desk.boundary()[0]] == [1, 0]


def test_what_is_no_use_is_counted_and_noted_and_nothing_else(desk):
    _, (report,) = desk.boundary()
    own = report.message_id
    desk.say({"what": 1}, own)
    desk.say({**graft().model_dump(mode="json"), "schema_version": 99}, own)
    desk.say(graft(), "")
    desk.say(graft(), "f" * 32)
    desk.say(graft(layer=7), own)
    desk.say(graft(seed=2), own)
    desk.say(AdaptationDecision(step=50, action=Action.UNLOAD, layer=0, seed=9), own)
    desk.say(graft().model_copy(update={"kernel_id": "e" * 64}), own)
    desk.say(graft(), own, key="runs/another")
    decisions, _ = desk.boundary()
    assert decisions == []
    (note,) = desk.notes
    for part in (
        "2 no decision",
        "3 of a place that there is not",
        "2 about no report of this run",
        "1 of a kernel that is not on offer",
        "the first: message",
    ):
        assert part in note
    assert desk.controller.counts == {"malformed": 2, "misplaced": 3, "stray": 2, "unknown": 1}


def test_advice_of_a_shadow_is_noted_and_never_done(desk):
    _, (report,) = desk.boundary()
    desk.say(graft(seed=1, reason="it would help"), report.message_id, topic=Topic.ADVICE)
    unload = AdaptationDecision(step=50, action=Action.UNLOAD, layer=0, seed=0)
    desk.say(unload, report.message_id, topic=Topic.ADVICE)
    assert desk.boundary()[0] == []
    (note,) = desk.notes
    assert note == (
        f"in shadow, the service would have: graft kernel {A.kernel_id[:12]} in seed 1 of layers.0,"
        " about step 50 (it would help); unload seed 0 of layers.0, about step 50"
    )
    assert desk.controller.counts == {"advised": 2}


def test_what_was_noted_leads_to_the_same_decisions_and_nobody_is_asked(desk):
    _, (report,) = desk.boundary()
    odd = graft(reason='"quoted" → \\ and\nmore', effect=(0.1, 1 / 3, 1e-300), confidence=0.1)
    desk.say(odd, report.message_id)
    desk.say(graft(seed=1), report.message_id)
    desk.say({"what": 1}, report.message_id)
    live, _ = desk.boundary()
    notes = desk.notes
    assert len(notes) == 2
    for bus in (None, desk.broker):
        again = ServiceController(bus=bus, name=NAME)
        seen = observe(100)
        object.__setattr__(seen, "recorded", lambda: notes)
        assert again.decide(seen) == live
        assert list(again.remarks()) == notes
        again.close()
    assert desk.heard.receive() == []
    # Where the record holds nothing of a boundary, nothing is done there.
    quiet = ServiceController()
    assert quiet.decide(observe(100)) == []


def test_a_record_written_by_hand_is_refused():
    seen = observe(100)
    object.__setattr__(seen, "recorded", lambda: ["the service asks for [1]"])
    with pytest.raises(InputError, match="says what a service asked for, and holds no decisions"):
        ServiceController().decide(seen)


def test_it_remembers_what_it_measured_through_its_state():
    one, other = ServiceController(), ServiceController()
    one.decide(observe(50))
    one.told(observe(50), [Decision(Action.GRAFT, 0, 0, "", A.kernel_id)], [])
    other.restore(one.state())
    assert other.state() == one.state()


# A bus that is away, or slow.


class Odd(MemoryBroker):
    """A bus that fails or hangs while a test says so."""

    def __init__(self):
        super().__init__()
        self.away = False
        self.free = threading.Event()
        self.free.set()

    def publish(self, messages):
        self.free.wait(60.0)
        if self.away:
            raise EsperError("the server is away\nfor long")
        super().publish(messages)


def test_a_bus_that_is_away_is_noted_once_and_asked_again():
    bus = Odd()
    controller = ServiceController(bus=bus, name=NAME, bound_seconds=60.0)
    told = bus.consumer("test", [Topic.MODEL_REPORT])
    bus.away = True
    said = []
    for step in (50, 100, 150):
        assert controller.decide(observe(step)) == []
        said += controller.remarks()
    assert said == [
        "the service could not be asked, and is at later boundaries: the server is away"
    ]
    bus.away = False
    # The one before is not waited for; once it went well, the next one is.
    reported = []
    for step in range(200, 2_000, 50):
        controller.decide(observe(step))
        reported += [each.message.payload["step"] for each in told.receive()]
        if reported:
            break
        threading.Event().wait(0.05)
    assert reported
    assert controller.counts == {"away": 1}
    controller.close()


def test_a_bus_that_hangs_keeps_a_boundary_no_longer_than_its_bound():
    bus = Odd()
    bus.free.clear()
    controller = ServiceController(bus=bus, name=NAME, bound_seconds=0.01, wait_seconds=0.01)
    controller.decide(observe(50))
    assert "it did not answer within 0.02 s" in controller.remarks()[0]
    controller.decide(observe(100))
    assert controller.remarks() == ()
    bus.free.set()
    controller.close()


def test_an_answer_that_comes_later_is_waited_for():
    bus, seen = MemoryBroker(), []
    reports = bus.consumer("service", [Topic.MODEL_REPORT])

    def answer():
        (delivery,) = reports.receive(1, 60.0)
        seen.append(delivery.message.message_id)
        for key, about in (("another", ""), (NAME, seen[0])):
            payload = graft(seed=1).model_dump(mode="json")
            message = OonaMessage(
                topic=Topic.DECISION, key=key, sender_id="t", trace_id=about, payload=payload
            )
            bus.publish([message])

    thread = threading.Thread(target=answer)
    thread.start()
    controller = ServiceController(bus=bus, name=NAME, wait_seconds=60.0)
    (decision,) = controller.decide(observe(50))
    thread.join()
    assert decision.seed == 1
    controller.close()


def test_two_runs_of_one_name_are_told_apart_by_the_later_one(desk):
    desk.boundary()
    other = ServiceController(bus=desk.broker, name=NAME)
    other.decide(observe(50))
    assert other.remarks() == ()
    desk.boundary()
    assert "another" in desk.notes[0]
    desk.boundary()
    assert desk.notes == []
    other.close()


def test_it_hears_on_a_redis_server_what_another_process_could_say(redis_url):
    bus = open_broker(redis_url)
    tamiyo = Tamiyo(Scripted(lambda news: [first_kernel(1)(news)]))
    with bus, serving(tamiyo, bus):
        controller = ServiceController(bus=redis_url, name=NAME, wait_seconds=60.0)
        (decision,) = controller.decide(observe(50))
        assert (decision.action, decision.seed) == (Action.GRAFT, 1)
        controller.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_boundaries_may_be_farther_apart_than_a_lease_lasts(kind, tmp_path):
    clock = Clock()
    bus = (
        MemoryBroker(clock=clock)
        if kind == "memory"
        else SqliteBroker(tmp_path / "bus", clock=clock)
    )
    with bus:
        told = bus.consumer("test", [Topic.MODEL_REPORT])
        controller = ServiceController(bus=bus, name=NAME, bound_seconds=60.0)
        controller.decide(observe(50))
        (report,) = told.receive()
        payload = graft().model_dump(mode="json")
        about = report.message.message_id
        clock.advance(10_000.0)
        bus.publish(
            [OonaMessage(topic=Topic.DECISION, key=NAME, sender_id="t", trace_id=about,
                         payload=payload)]
        )  # fmt: skip
        clock.advance(10_000.0)
        assert len(controller.decide(observe(100))) == 1
        assert controller.remarks()[0].startswith("the service asks for [{")
        controller.close()


def test_it_leaves_the_bus_as_it_was(desk):
    before = {(own.group, own.topic) for own in desk.broker.statistics().groups}
    _, (report,) = desk.boundary()
    assert {(own.group, own.topic) for own in desk.broker.statistics().groups} > before
    desk.say(graft(), report.message_id)
    desk.controller.close()
    desk.controller.close()
    assert {(own.group, own.topic) for own in desk.broker.statistics().groups} == before


def test_a_report_that_cannot_be_made_ends_no_run(desk):
    seeds = init_seeds(1, 2).replace(alpha=np.full((1, 2), 1.5, np.float32))
    decisions, found = desk.boundary(seeds)
    assert (decisions, found) == ([], [])
    assert "no report can be made" in desk.notes[0]
    desk.boundary(seeds)
    assert desk.notes == []


def test_a_service_by_rule_empties_what_failed_in_a_run():
    """`Tamiyo` with an advisor that looks at health alone, over a bus, at the same boundary."""

    def script(news):
        ill = [(int(own["layer"]), int(own["seed"])) for own in news.health if own["errors"] > 2]
        return [Decision(Action.UNLOAD, *place, "it fails") for place in ill]

    bus = Prompt().answered_by(Tamiyo(Scripted(script)))
    controller = ServiceController(bus=bus, name=NAME, wait_seconds=0.001)
    seeds = apply_event(hold((0, 0)), Event(1, 0, 0, EventKind.HEALTH, value=0.1))
    ill = seeds.replace(error_count=np.array([[3, 0]], np.int32))
    assert controller.decide(observe(50, seeds=seeds)) == []
    (decision,) = controller.decide(observe(100, seeds=ill))
    assert (decision.action, decision.layer, decision.seed) == (Action.UNLOAD, 0, 0)
    controller.close()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"wait_seconds": -1.0}, "wait_seconds of the service controller must be a finite number"),
        ({"bound_seconds": -1.0}, "bound_seconds of the service controller must be a finite numb"),
        ({"offset": -1}, "offset must be a whole number"),
        ({"name": ""}, "by its name, a printable text of 1 to 200 letters; got ''"),
        ({"name": "a\nb"}, "by its name, a printable text"),
        ({"bus": "http://x"}, "http: names no bus"),
        ({"bus": "memory:"}, "is in one process, where no service hears it"),
    ],
)
def test_values_that_cannot_be_are_refused(values, match):
    with pytest.raises(InputError, match=match):
        make_controller("service", **values)


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("bus", "'bus' names no bus: expected memory:, sqlite:PATH or redis://"),
        ("redis:", "redis: names no bus"),
        ("sqlite:no-such-folder/bus", "there is no folder"),
        ("sqlite:bus?mode=ro", "asks for mode: a bus on a file knows synchronous=full alone"),
    ],
)
def test_an_address_is_checked_without_opening_anything(url, match):
    with pytest.raises(InputError, match=match):
        check_bus_url(url)


def test_an_address_that_may_be_is_left_alone(tmp_path):
    check_bus_url("memory:")
    check_bus_url(f"sqlite:{tmp_path / 'bus'}?synchronous=full")
    assert list(tmp_path.iterdir()) == []

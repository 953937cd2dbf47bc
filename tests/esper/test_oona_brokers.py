"""What every broker promises, tried with each of them."""

import re
import threading
import time
from collections.abc import Iterator

import pytest

from esper.contracts import MAX_MESSAGE_BYTES, OonaMessage, Topic
from esper.errors import (
    BusError,
    BusFullError,
    InputError,
    LeaseLostError,
    MessageError,
    UnknownTopicError,
)
from esper.oona import Broker, GroupStatistics, TopicStatistics
from tests.esper.oona_brokers import (
    TOPIC,
    Kind,
    MemoryKind,
    RedisKind,
    SqliteKind,
    message,
    messages,
    values,
)


@pytest.fixture(params=["memory", "sqlite", "redis"])
def kind(request, tmp_path) -> Iterator[Kind]:
    kinds = {
        "memory": MemoryKind,
        "sqlite": lambda: SqliteKind(tmp_path / "bus.sqlite"),
        "redis": lambda: RedisKind(request.getfixturevalue("redis_url")),
    }
    made = kinds[request.param]()
    yield made
    made.close()


@pytest.fixture
def broker(kind) -> Broker:
    return kind.open()


def drained(consumer, most=64) -> list[object]:
    """All values that there are, each acknowledged."""
    found = []
    while got := consumer.receive(most):
        found += values(got)
        consumer.acknowledge(got)
    return found


def test_every_group_gets_every_message_once_and_each_key_in_order(broker):
    groups = [broker.consumer(name, [TOPIC]) for name in ("a", "b")]
    sent = messages(200, keys=7)
    for first in range(0, 200, 30):
        broker.publish(sent[first : first + 30])
    for consumer in groups:
        found = drained(consumer)
        assert sorted(found) == list(range(200))
        for key in range(7):
            assert [v for v in found if v % 7 == key] == list(range(key, 200, 7))
        assert consumer.receive() == []


def test_a_message_is_received_as_it_was_published(broker):
    consumer = broker.consumer("a", list(Topic))
    sent = [message({"deep": [None, 1.5, "ü\u2028"]}, key=topic, topic=topic, trace_id="t")
            for topic in Topic]  # fmt: skip
    broker.publish(sent)
    got = consumer.receive(100)
    assert sorted(each.message.model_dump_json() for each in got) == sorted(
        each.model_dump_json() for each in sent
    )
    assert {each.attempt for each in got} == {1}
    assert {each.place.topic for each in got} == set(Topic)


def test_a_new_group_starts_behind_what_is_there_or_with_the_oldest(broker):
    broker.publish(messages(5))
    new, everything = broker.consumer("new", [TOPIC]), broker.consumer("all", [TOPIC], start="all")
    broker.publish(messages(5, first=5))
    assert drained(new) == [5, 6, 7, 8, 9]
    assert drained(everything) == list(range(10))


def test_a_group_goes_on_where_it_was_whatever_a_later_consumer_asks_for(broker):
    with broker.consumer("a", [TOPIC], start="all") as first:
        broker.publish(messages(6))
        first.acknowledge(first.receive(2))
    broker.publish(messages(2, first=6))
    for start in ("new", "all"):
        with broker.consumer("a", [TOPIC], start=start) as later:
            got = later.receive(3)
            later.acknowledge(got)
            assert values(got) == {"new": [2, 3, 4], "all": [5, 6, 7]}[start]


def test_consumers_of_a_group_share_the_partitions(broker):
    consumers = [broker.consumer("a", [TOPIC]) for _ in range(3)]
    assert all(consumer.receive() == [] for consumer in consumers * 2)
    broker.publish(messages(400, keys=100))
    got = [consumer.receive(400) for consumer in consumers]
    assert sorted(value for each in got for value in values(each)) == list(range(400))
    assert all(got)
    keys = [{each.message.key for each in own} for own in got]
    assert not keys[0] & keys[1] | keys[1] & keys[2] | keys[0] & keys[2]
    assert max(len({d.place.partition for d in own}) for own in got) == 3


def test_one_who_joins_gets_a_share_once_what_is_held_is_settled(broker):
    first = broker.consumer("a", [TOPIC])
    broker.publish(messages(100, keys=50))
    held = first.receive(100)
    second = broker.consumer("a", [TOPIC])
    broker.publish(messages(100, keys=50, first=100))
    # All partitions are in use; four of them are on their way to the second.
    assert second.receive(100) == []
    own = first.receive(100)
    assert 0 < len(own) < 100
    first.acknowledge(held + own)
    assert first.receive(100) == []
    rest = second.receive(100)
    assert sorted(values(own) + values(rest)) == list(range(100, 200))


def test_what_is_not_settled_comes_again_after_the_lease_before_anything_newer(kind, broker):
    dead = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    broker.publish(messages(6))
    got = dead.receive(4)
    dead.acknowledge(got[1:2])
    heir = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    assert heir.receive() == []
    kind.clock.advance(9.0)
    assert heir.receive() == []
    kind.clock.advance(1.5)
    got = heir.receive()
    assert values(got) == [0, 2, 3, 4, 5]
    assert [each.attempt for each in got] == [2, 2, 2, 1, 1]


def test_renewing_holds_on_to_what_was_received(kind, broker):
    slow = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    broker.publish(messages(2))
    got = slow.receive()
    other = broker.consumer("a", [TOPIC])
    for _ in range(5):
        kind.clock.advance(6.0)
        slow.renew()
        assert other.receive() == []
    slow.acknowledge(got)
    kind.clock.advance(20.0)
    assert other.receive() == []


def test_acknowledging_renews_too(kind, broker):
    slow = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    broker.publish(messages(4))
    other = broker.consumer("a", [TOPIC])
    for delivery in slow.receive():
        kind.clock.advance(6.0)
        assert other.receive() == []
        slow.acknowledge([delivery])


def test_acknowledging_what_another_has_by_now_is_refused_and_the_rest_is_done(kind, broker):
    slow = broker.consumer("a", [TOPIC], name="slow", lease_seconds=10.0)
    broker.publish(messages(3))
    got = slow.receive()
    kind.clock.advance(11.0)
    heir = broker.consumer("a", [TOPIC])
    assert values(heir.receive(2)) == [0, 1]
    with pytest.raises(LeaseLostError, match=r"2 of 3 messages .* 'slow'.* 10 s.*renew\(\)"):
        slow.acknowledge(got)
    # The third one was nobody else's yet.
    assert heir.receive() == []
    slow.acknowledge(got)


@pytest.mark.parametrize("settle", ["acknowledge", "give_back", "reject"])
def test_settling_twice_is_settling_once(broker, settle):
    consumer = broker.consumer("a", [TOPIC])
    broker.publish(messages(1))
    got = consumer.receive()
    for _ in range(2):
        getattr(consumer, settle)(got, *(["broken"] if settle == "reject" else []))
    again = consumer.receive()
    assert [each.attempt for each in again] == ([2] if settle == "give_back" else [])
    assert len(broker.dead_letters()) == (settle == "reject")
    consumer.acknowledge(again)
    consumer.acknowledge(got + again)


def test_what_is_given_back_comes_again_in_its_order(broker):
    consumer = broker.consumer("a", [TOPIC])
    broker.publish(messages(5))
    got = consumer.receive(4)
    consumer.give_back([got[2], got[0]])
    consumer.acknowledge([got[1]])
    assert values(consumer.receive()) == [0, 2, 4]


def test_closing_gives_what_is_held_to_the_others_at_once(broker):
    first, second = broker.consumer("a", [TOPIC]), broker.consumer("a", [TOPIC])
    first.receive()
    broker.publish(messages(40, keys=20))
    held = first.receive()
    assert held
    first.close()
    assert sorted(values(second.receive())) == list(range(40))


def test_after_max_deliveries_a_message_is_a_dead_letter_and_blocks_nothing(broker):
    consumer = broker.consumer("a", [TOPIC], max_deliveries=2)
    broker.publish(messages(2))
    for attempt in (1, 2):
        got = consumer.receive(1)
        assert [(each.attempt, *values([each])) for each in got] == [(attempt, 0)]
        consumer.give_back(got)
    assert values(consumer.receive()) == [1]
    (letter,) = broker.dead_letters(TOPIC)
    assert letter.message is not None
    assert letter.message.payload == {"value": 0}
    assert (letter.group, letter.attempts, letter.topic) == ("a", 2, TOPIC)
    assert letter.reason == "delivered 2 times and never settled"
    assert broker.statistics().dead == 1
    assert broker.dead_letters(Topic.HEALTH) == []


def test_a_message_that_kills_its_readers_takes_no_others_with_it(kind, broker):
    broker.consumer("a", [TOPIC], name="first").close()
    broker.publish(messages(6))
    done = []
    for life in range(12):
        reader = broker.consumer("a", [TOPIC], name=f"life-{life}", lease_seconds=10.0)
        while got := reader.receive():
            for each in got:
                if each.message.payload["value"] == 3:
                    break
                done += values([each])
                reader.acknowledge([each])
            else:
                continue
            break
        # It is dead, and says nothing more.
        kind.clock.advance(11.0)
    assert sorted(done) == [0, 1, 2, 4, 5]
    (letter,) = broker.dead_letters()
    assert (letter.message.payload["value"], letter.attempts) == (3, 5)


def test_from_the_third_delivery_on_a_message_comes_alone(broker):
    consumer = broker.consumer("a", [TOPIC])
    broker.publish(messages(3))
    for _ in range(2):
        consumer.give_back(consumer.receive())
    for value in range(3):
        got = consumer.receive()
        assert [(each.attempt, *values([each])) for each in got] == [(3, value)]
        assert consumer.receive(wait_seconds=0.05) == []
        consumer.acknowledge(got)
    assert consumer.receive() == []


def lapsed(kind, broker):
    """A consumer whose lease ran out when it had a message that comes alone."""
    slow = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    broker.publish([message(0)])
    for _ in range(2):
        slow.give_back(slow.receive())
    held = slow.receive()
    assert [each.attempt for each in held] == [3]
    kind.clock.advance(11.0)
    return slow, held


@pytest.mark.parametrize("settle", ["acknowledge", "reject"])
def test_one_who_lost_a_message_that_comes_alone_goes_on_when_another_is_done(kind, broker, settle):
    slow, held = lapsed(kind, broker)
    with broker.consumer("a", [TOPIC]) as other:
        getattr(other, settle)(other.receive(), *(["no"] if settle == "reject" else []))
    broker.publish([message(1)])
    assert values(slow.receive()) == [1]
    slow.acknowledge(held)


def test_one_whose_lease_ran_out_and_whose_message_nobody_took_has_it_alone(kind, broker):
    slow, held = lapsed(kind, broker)
    broker.publish([message(1)])
    assert slow.receive() == []
    slow.acknowledge(held)
    assert values(slow.receive()) == [1]


def test_one_who_lost_a_message_that_comes_alone_goes_on_with_its_share(kind, broker):
    slow, held = lapsed(kind, broker)
    other = broker.consumer("a", [TOPIC], lease_seconds=100.0)
    taken = other.receive()
    assert [each.attempt for each in taken] == [4]
    for consumer in (slow, other, slow):
        assert consumer.receive() == []
    with pytest.raises(LeaseLostError):
        slow.acknowledge(held)
    broker.publish(messages(40, keys=20, first=1))
    own = drained(slow)
    assert 0 < len(own) < 40
    other.close()
    assert sorted(own + drained(slow)) == list(range(41))


def test_one_who_lost_a_message_that_comes_alone_may_have_its_partition_again(kind, broker):
    slow, _ = lapsed(kind, broker)
    other = broker.consumer("a", [TOPIC], lease_seconds=100.0)
    taken = other.receive()
    assert slow.receive() == []
    other.acknowledge(taken)
    other.close()
    broker.publish([message(1)])
    assert values(slow.receive()) == [1]


def test_a_rejected_message_is_a_dead_letter_of_its_group_with_the_reason(broker):
    one, other = broker.consumer("one", [TOPIC]), broker.consumer("other", [TOPIC])
    broker.publish(messages(2))
    one.reject(one.receive(1), "no kernel of that id")
    assert values(other.receive()) == [0, 1]
    (letter,) = broker.dead_letters()
    assert (letter.group, letter.reason, letter.attempts) == ("one", "no kernel of that id", 1)
    with pytest.raises(InputError, match="say why"):
        one.reject(one.receive(1), " ")


def test_a_letter_that_is_redriven_comes_again_to_its_group_alone(broker):
    one, other = broker.consumer("one", [TOPIC]), broker.consumer("other", [TOPIC])
    broker.publish(messages(3))
    one.reject(one.receive(2), "not now")
    letters = broker.dead_letters()
    assert drained(one) == [2]
    assert drained(other) == [0, 1, 2]
    assert broker.redrive(letters[:1]) == 1
    assert broker.redrive(letters[:1]) == 0
    got = one.receive()
    assert [(each.attempt, *values([each])) for each in got] == [(1, 0)]
    assert other.receive() == []
    assert [letter.message.payload["value"] for letter in broker.dead_letters()] == [1]
    one.acknowledge(got)
    assert broker.statistics().group("other", TOPIC).lag == 0


def test_any_number_of_letters_for_another_group_is_passed_over(broker):
    one, other = broker.consumer("one", [TOPIC]), broker.consumer("other", [TOPIC])
    broker.publish(messages(1100))
    one.reject(one.receive(2000), "not now")
    other.acknowledge(other.receive(2000))
    assert broker.redrive(broker.dead_letters(limit=2000)) == 1100
    broker.publish(messages(1, first=1100))
    assert values(other.receive(1)) == [1100]
    assert values(one.receive(2000)) == list(range(1101))


def test_any_number_of_messages_may_have_been_delivered_too_often(broker):
    consumer = broker.consumer("a", [TOPIC], max_deliveries=1)
    broker.publish(messages(1101))
    consumer.give_back(consumer.receive(1100))
    assert values(consumer.receive(1)) == [1100]
    assert broker.statistics().dead == 1100


def test_dead_letters_come_oldest_first_up_to_a_limit(broker):
    consumer = broker.consumer("a", [TOPIC, Topic.HEALTH])
    for value in range(4):
        broker.publish([message(value, topic=[TOPIC, Topic.HEALTH][value % 2])])
        consumer.reject(consumer.receive(), f"reason {value}")
    assert [letter.reason for letter in broker.dead_letters()] == [f"reason {i}" for i in range(4)]
    assert [letter.reason for letter in broker.dead_letters(limit=2)] == ["reason 0", "reason 1"]
    assert [letter.reason for letter in broker.dead_letters("health.measured")] == [
        "reason 1", "reason 3",
    ]  # fmt: skip
    with pytest.raises(InputError, match="limit is at least 0, got -1"):
        broker.dead_letters(limit=-1)


def test_a_full_stream_lets_go_of_what_is_acknowledged_and_then_of_the_oldest(kind):
    broker = kind.open(capacity=10)
    consumer = broker.consumer("a", [TOPIC])
    broker.publish(messages(10, keys=5))
    assert len(drained(consumer)) == 10
    broker.publish(messages(10, keys=5, first=10))
    assert broker.statistics().topic(TOPIC) == TopicStatistics(TOPIC, 10, 0, 0)
    broker.publish(messages(3, keys=5, first=20))
    assert broker.statistics().topic(TOPIC) == TopicStatistics(TOPIC, 10, 3, 0)
    assert sorted(drained(consumer)) == list(range(13, 23))
    broker.publish(messages(25, keys=5, first=100))
    assert sorted(drained(consumer)) == list(range(115, 125))
    assert broker.statistics().dropped == 3 + 15


def test_what_is_held_and_dropped_is_done_with(kind):
    broker = kind.open(capacity=4)
    consumer = broker.consumer("a", [TOPIC])
    broker.publish(messages(4))
    got = consumer.receive(3)
    broker.publish(messages(4, first=4))
    assert broker.statistics().dropped == 4
    consumer.give_back(got[:1])
    consumer.acknowledge(got[1:])
    assert drained(consumer) == [4, 5, 6, 7]
    assert broker.statistics().groups == (GroupStatistics("a", TOPIC, 0, 0, 1),)


def test_a_full_stream_refuses_where_it_was_asked_to_and_loses_nothing(kind):
    broker = kind.open(capacity=10, full="refuse")
    slow, quick = broker.consumer("slow", [TOPIC]), broker.consumer("quick", [TOPIC])
    broker.publish(messages(8, keys=3))
    assert len(drained(quick)) == 8
    with pytest.raises(
        BusFullError, match=r"training\.metrics holds 8 messages .* 10 at most: .* room for 3 more"
    ):
        broker.publish([*messages(3, first=8), message(0, topic=Topic.HEALTH)])
    # All or nothing.
    assert broker.statistics().length == 8
    broker.publish(messages(2, first=8))
    assert sorted(drained(slow)) == list(range(10))
    assert sorted(drained(quick)) == [8, 9]
    broker.publish(messages(5, first=10))
    assert (broker.statistics().dropped, broker.statistics().length) == (0, 5)


def test_a_stream_without_a_group_is_full_too(kind):
    broker = kind.open(capacity=2, full="refuse")
    broker.publish(messages(2))
    with pytest.raises(BusFullError):
        broker.publish(messages(1))


def test_a_group_that_is_removed_holds_nothing_back(kind):
    broker = kind.open(capacity=2, full="refuse")
    gone, kept = broker.consumer("gone", [TOPIC]), broker.consumer("kept", [TOPIC])
    broker.publish(messages(2))
    assert drained(kept) == [0, 1]
    gone.close()
    broker.remove_group("gone")
    broker.remove_group("never there")
    broker.publish(messages(2, first=2))
    assert drained(kept) == [2, 3]
    assert [own.group for own in broker.statistics().groups] == ["kept"]


def test_a_message_published_again_is_the_same_as_long_as_its_stream_holds_it(kind):
    broker = kind.open(capacity=4)
    consumer = broker.consumer("a", [TOPIC])
    sent = messages(4)
    broker.publish([sent[0], sent[0]])
    broker.publish(sent[:3])
    assert drained(consumer) == [0, 1, 2]
    broker.publish(sent)
    assert drained(consumer) == [3]
    assert broker.statistics().topic(TOPIC).length == 4
    broker.publish(messages(4, first=4))
    drained(consumer)
    broker.publish(sent[:1])
    assert drained(consumer) == [0]


def test_a_consumer_started_again_under_its_name_has_what_the_first_had_at_once(broker):
    first = broker.consumer("a", [TOPIC], name="worker-1")
    broker.publish(messages(3))
    held = first.receive(2)
    second = broker.consumer("a", [TOPIC], name="worker-1")
    assert second.name == "worker-1"
    assert [each.attempt for each in second.receive()] == [2, 2, 1]
    for call in (first.receive, first.renew, lambda: first.acknowledge(held)):
        with pytest.raises(LeaseLostError, match="another consumer was started as 'worker-1'"):
            call()
    first.close()
    broker.publish(messages(1, first=3))
    assert values(second.receive()) == [3]
    assert broker.statistics().group("a", TOPIC).consumers == 1


def test_a_clock_that_was_set_back_keeps_no_lease_alive(kind, broker):
    dead = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    broker.publish(messages(2))
    assert len(dead.receive()) == 2
    kind.clock.advance(-1000.0)
    heir = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    assert values(heir.receive()) == [0, 1]


def test_a_clock_that_jumps_ahead_loses_nothing(kind, broker):
    consumer = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    broker.publish(messages(2))
    got = consumer.receive(1)
    kind.clock.advance(1e6)
    assert values(consumer.receive()) == [1]
    consumer.acknowledge(got)
    assert broker.statistics().groups == (GroupStatistics("a", TOPIC, 0, 1, 1),)


def test_what_cannot_be_read_is_a_dead_letter_and_blocks_nothing(kind, broker):
    consumer = broker.consumer("a", [TOPIC], start="all")
    newer = message(9).to_bytes().replace(b'"schema_version":1', b'"schema_version":99')
    broker.publish([message(1)])
    kind.spoil(broker, TOPIC, "", b"\xff not JSON")
    assert values(consumer.receive(1)) == [1]
    broker.publish([message(2)])
    assert values(consumer.receive()) == [2]
    (letter,) = broker.dead_letters()
    assert letter.body == b"\xff not JSON"
    assert letter.message is None
    assert "cannot be read: this is no message: it is no JSON" in letter.reason
    assert broker.redrive([letter]) == 0
    assert len(broker.dead_letters()) == 1
    assert b"99" in newer


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (message(9).to_bytes().replace(b'"schema_version":1', b'"schema_version":99'), "99.*newer"),
        (message(9, topic=Topic.HEALTH).to_bytes(), "lies under training.metrics, and says health"),
        (message(9).to_bytes().replace(b"training.metrics", b"training.metric"), "did you mean"),
        (b"", "no JSON"),
        (b"[1]", "no JSON object"),
    ],
)
def test_a_dead_letter_says_why_it_cannot_be_read(kind, broker, body, reason):
    consumer = broker.consumer("a", [TOPIC], start="all")
    kind.spoil(broker, TOPIC, "", body)
    assert consumer.receive() == []
    (letter,) = broker.dead_letters()
    assert re.search(reason, letter.reason)
    assert letter.body == body


def test_waiting_ends_when_something_is_published(broker):
    consumer = broker.consumer("a", [TOPIC])
    found = []
    reader = threading.Thread(target=lambda: found.append(consumer.receive(wait_seconds=60.0)))
    reader.start()
    broker.publish(messages(1))
    reader.join(30.0)
    assert not reader.is_alive()
    assert values(found[0]) == [0]


def test_one_that_is_closed_while_it_waits_says_so(broker):
    consumer = broker.consumer("a", [TOPIC], lease_seconds=0.4)
    told: list[BusError] = []

    def wait() -> None:
        try:
            consumer.receive(wait_seconds=60.0)
        except BusError as error:
            told.append(error)

    reader = threading.Thread(target=wait)
    reader.start()
    # It may be closed before it waits, and says the same then.
    time.sleep(0.05)
    consumer.close()
    reader.join(30.0)
    assert not reader.is_alive()
    assert "cannot receive: it was closed; join the group again" in str(told[0])


def test_statistics_tell_lengths_lags_and_who_is_there(kind, broker):
    assert broker.statistics().topics == ()
    first = broker.consumer("a", [TOPIC], lease_seconds=10.0)
    broker.consumer("a", [TOPIC], lease_seconds=100.0)
    broker.publish(messages(10, keys=10))
    broker.publish([message(0, topic=Topic.HEALTH)])
    held = first.receive(2)
    first.acknowledge(held[:1])
    found = broker.statistics()
    assert found.group("a", TOPIC) == GroupStatistics("a", TOPIC, 8, 1, 2)
    assert found.group("a", Topic.HEALTH) is None
    assert found.topic(Topic.HEALTH) == TopicStatistics(Topic.HEALTH, 1, 0, 0)
    assert found.topic(Topic.ERROR) == TopicStatistics(Topic.ERROR, 0, 0, 0)
    assert (found.length, found.dropped, found.dead) == (11, 0, 0)
    kind.clock.advance(20.0)
    assert broker.statistics().group("a", TOPIC).consumers == 1


def test_what_is_no_message_is_refused_and_nothing_of_the_batch_is_published(broker):
    good = message(1)
    with pytest.raises(MessageError, match="a bus carries OonaMessage, got dict"):
        broker.publish([good, {"topic": "training.metrics"}])
    with pytest.raises(MessageError, match=f"at most {MAX_MESSAGE_BYTES:,}"):
        broker.publish([good, message("x" * MAX_MESSAGE_BYTES)])
    odd = OonaMessage.model_construct(**{**good.__dict__, "topic": "training.metric"})
    with pytest.raises(UnknownTopicError, match=r"did you mean 'training\.metrics'"):
        broker.publish([good, odd])
    assert broker.statistics().length == 0
    broker.publish([])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"topics": ["training.metric"]}, UnknownTopicError, r"did you mean 'training\.metrics'"),
        ({"topics": []}, InputError, "at least one topic"),
        ({"topics": "training.metrics"}, InputError, "topics is a list, got the text"),
        ({"group": ""}, InputError, "group is a printable text of 1 to 200 characters, got ''"),
        ({"group": "a\nb"}, InputError, "group is a printable text"),
        ({"name": "x" * 201}, InputError, "name is a printable text"),
        ({"start": "old"}, InputError, "'new' messages or with 'all' that are there, not 'old'"),
        ({"lease_seconds": 0.0}, InputError, "lease_seconds is more than 0 .* got 0.0"),
        ({"lease_seconds": float("nan")}, InputError, "lease_seconds is more than 0 .* got nan"),
        ({"max_deliveries": 0}, InputError, "max_deliveries is at least 1, got 0"),
    ],
)
def test_joining_with_what_cannot_be_is_refused(broker, options, error, match):
    given = {"group": "a", "topics": [TOPIC], **options}
    with pytest.raises(error, match=match):
        broker.consumer(**given)
    assert broker.statistics().groups == ()


@pytest.mark.parametrize("most", [0, 10_001])
def test_receiving_none_or_too_many_is_refused(broker, most):
    with pytest.raises(InputError, match=f"most is from 1 to 10000 messages, got {most}"):
        broker.consumer("a", [TOPIC]).receive(most)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"capacity": 0}, "capacity is at least 1 message, got 0"),
        ({"full": "block"}, "to 'drop' the oldest or to 'refuse', not 'block'"),
        ({"partitions": 0}, "from 1 to 256 partitions, got 0"),
        ({"partitions": 257}, "from 1 to 256 partitions, got 257"),
    ],
)
def test_a_bus_that_cannot_be_is_refused(kind, options, match):
    with pytest.raises(InputError, match=match):
        kind.open(**options)


def test_a_closed_bus_says_so(kind, broker):
    consumer, other = broker.consumer("a", [TOPIC]), broker.consumer("a", [TOPIC], name="own")
    other.close()
    other.close()
    with pytest.raises(BusError, match="consumer 'own' of group 'a' cannot receive: it was closed"):
        other.receive()
    broker.close()
    broker.close()
    for call in (
        lambda: broker.publish(messages(1)),
        lambda: broker.consumer("a", [TOPIC]),
        lambda: broker.dead_letters(),
        lambda: broker.redrive([]),
        lambda: broker.remove_group("a"),
        lambda: broker.statistics(),
    ):
        with pytest.raises(BusError, match="this bus was closed; open another one"):
            call()
    with pytest.raises(BusError, match="it was closed"):
        consumer.receive()

"""What publishes from a thread of its own: in batches, or without ever being in the way."""

import enum
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import MAX_MESSAGE_BYTES, OonaMessage, Topic
from esper.errors import BusError, BusFullError, InputError, MessageError, ServiceUnavailableError
from esper.oona import BatchingPublisher, DropReason, InProcessBus, MemoryBroker, TelemetryBus
from tests.esper.oona_brokers import TOPIC, message, messages, values


class Gate(MemoryBroker):
    """A real broker behind a gate: shut, it is away; what it takes is noted by call."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.calls: list[int] = []
        self.away: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    def publish(self, messages: Sequence[OonaMessage]) -> None:
        self.open.wait(60.0)
        if self.away is not None:
            raise self.away
        super().publish(messages)
        self.calls.append(len(messages))


AWAY = ServiceUnavailableError("the server could not be reached")


def read(broker) -> list[object]:
    consumer = broker.consumer("reader", [TOPIC], start="all", name="reader")
    found = []
    while got := consumer.receive(1000):
        found += values(got)
        consumer.acknowledge(got)
    return found


def eventually(condition) -> None:
    until = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@given(
    st.lists(st.integers(0, 400), max_size=60),
    st.integers(1, 20),
    st.integers(1, 2000),
)
def test_a_publisher_keeps_order_and_its_limits_and_closing_loses_nothing(sizes, most, most_bytes):
    broker = Gate()
    sent = [message([i, "x" * size]) for i, size in enumerate(sizes)]
    with BatchingPublisher(broker, max_messages=most, max_bytes=most_bytes) as publisher:
        for each in sent:
            publisher.publish(each)
    assert read(broker) == [each.payload["value"] for each in sent]
    assert max(broker.calls, default=0) <= most
    rest = iter(sent)
    for count in broker.calls:
        batch = [len(next(rest).to_bytes()) for _ in range(count)]
        assert count == 1 or sum(batch) <= most_bytes
    found = publisher.statistics
    assert (found.published, found.batches, found.waiting) == (len(sent), len(broker.calls), 0)
    assert found.waiting_bytes == 0


def test_a_batch_goes_when_it_is_full_or_when_its_first_message_has_waited():
    broker = Gate()
    with BatchingPublisher(broker, max_messages=3, max_seconds=3600.0) as publisher:
        for each in messages(7):
            publisher.publish(each)
        eventually(lambda: sum(broker.calls) == 6)
        assert publisher.statistics.waiting == 1
        publisher.flush()
        assert sum(broker.calls) == 7
    with BatchingPublisher(broker, max_messages=100, max_seconds=0.01) as publisher:
        publisher.publish(message(7))
        eventually(lambda: sum(broker.calls) == 8)
    with BatchingPublisher(broker, max_bytes=300, max_seconds=3600.0) as publisher:
        publisher.publish(message(8))
        publisher.publish(message(9))
        eventually(lambda: sum(broker.calls) >= 9)
    assert read(broker) == list(range(10))


def test_a_full_publisher_refuses_where_it_was_asked_to():
    broker = Gate()
    broker.open.clear()
    publisher = BatchingPublisher(broker, capacity=3, when_full="refuse")
    for each in messages(3):
        publisher.publish(each)
    with pytest.raises(BusFullError, match="3 messages wait to be published, .* in 0 s"):
        publisher.publish(message(3))
    assert publisher.statistics.refused == 1
    broker.open.set()
    publisher.close()
    assert read(broker) == [0, 1, 2]


def test_a_full_publisher_waits_for_room_and_shows_it():
    broker = Gate()
    broker.open.clear()
    publisher = BatchingPublisher(broker, capacity=2, timeout_seconds=60.0)
    writer = threading.Thread(target=lambda: [publisher.publish(m) for m in messages(5)])
    writer.start()
    eventually(lambda: publisher.statistics.blocked == 1)
    broker.open.set()
    writer.join(30.0)
    publisher.close()
    assert read(broker) == [0, 1, 2, 3, 4]
    assert publisher.statistics.refused == 0


def test_waiting_for_room_ends_with_what_is_wrong_with_the_bus():
    broker = Gate()
    broker.away = AWAY
    publisher = BatchingPublisher(broker, capacity=1, timeout_seconds=0.05)
    publisher.publish(message(0))
    eventually(lambda: publisher.statistics.failures)
    with pytest.raises(BusFullError, match=r"none went in 0.05 s: the server could not be reached"):
        publisher.publish(message(1))
    assert (publisher.statistics.blocked, publisher.statistics.refused) == (1, 1)
    broker.away = None
    publisher.close()
    assert read(broker) == [0]


@pytest.mark.parametrize("away", [AWAY, BusFullError("no room")])
def test_a_publisher_goes_on_by_itself_when_the_bus_is_back(away):
    broker = Gate()
    broker.away = away
    publisher = BatchingPublisher(broker, max_messages=2)
    for each in messages(5):
        publisher.publish(each)
    with pytest.raises(BusError, match=r"5 messages were not published within 0.1 s: "):
        publisher.flush(0.1)
    assert publisher.statistics.last_error == str(away)
    broker.away = None
    publisher.flush()
    publisher.close()
    assert read(broker) == [0, 1, 2, 3, 4]
    assert publisher.statistics.failures > 0


def test_closing_while_the_bus_is_away_says_what_is_left_and_keeps_it():
    broker = Gate()
    broker.away = AWAY
    publisher = BatchingPublisher(broker)
    sent = messages(3)
    for each in sent:
        publisher.publish(each)
    with pytest.raises(BusError, match="3 messages were not published within 0.1 s"):
        publisher.close(0.1)
    assert publisher.unpublished == sent
    with pytest.raises(BusError, match="this publisher was closed; make another one"):
        publisher.publish(message(4))


class Choosy(Gate):
    """It refuses a value, and after that is away for some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.away_for = 0

    def publish(self, messages: Sequence[OonaMessage]) -> None:
        if self.away_for:
            self.away_for -= 1
            raise AWAY
        if any(each.payload["value"] == "bad" for each in messages):
            if len(messages) > 1:
                self.away_for = 2
            raise MessageError("not here")
        super().publish(messages)


def test_a_message_that_is_rejected_is_counted_apart_and_the_others_go_though_the_bus_is_away():
    broker = Choosy()
    publisher = BatchingPublisher(broker, max_messages=4, max_seconds=3600.0)
    for each in (0, 1, "bad", 2):
        publisher.publish(message(each))
    eventually(lambda: publisher.statistics.waiting == 0)
    found = publisher.statistics
    assert (found.published, found.rejected, found.failures) == (3, 1, 3)
    assert found.waiting_bytes == 0
    publisher.close()
    assert read(broker) == [0, 1, 2]


def test_a_batch_larger_than_a_stream_that_refuses_goes_in_parts():
    broker = Gate(capacity=3, full="refuse")
    consumer = broker.consumer("reader", [TOPIC], start="all", name="reader")
    publisher = BatchingPublisher(broker, max_messages=8, max_seconds=3600.0)
    for each in messages(8):
        publisher.publish(each)
    found: list[object] = []

    def all_came() -> bool:
        got = consumer.receive(1000)
        found.extend(values(got))
        consumer.acknowledge(got)
        return len(found) == 8

    eventually(all_came)
    publisher.close()
    assert found == list(range(8))
    assert publisher.statistics.published == 8


def test_telemetry_larger_than_a_stream_that_refuses_goes_in_parts():
    broker = Gate(capacity=3, full="refuse")
    consumer = broker.consumer("reader", [TOPIC], start="all", name="reader")
    found: list[object] = []
    with TelemetryBus(broker, sender_id="run", max_seconds=0.01) as bus:
        for i in range(8):
            bus.publish(TOPIC, {"value": i})

        def all_came() -> bool:
            got = consumer.receive(1000)
            found.extend(values(got))
            consumer.acknowledge(got)
            return len(found) == 8

        eventually(all_came)
    assert found == list(range(8))
    assert (bus.statistics.published, bus.statistics.dropped) == (8, {})


def test_a_publisher_refuses_what_is_no_message_at_once():
    with BatchingPublisher(MemoryBroker()) as publisher:
        with pytest.raises(MessageError, match="carries OonaMessage, got dict"):
            publisher.publish({})
        with pytest.raises(MessageError, match=f"at most {MAX_MESSAGE_BYTES:,}"):
            publisher.publish(message("x" * MAX_MESSAGE_BYTES))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_messages": 0}, "max_messages is at least 1, got 0"),
        ({"max_bytes": 0}, "max_bytes is at least 1, got 0"),
        ({"capacity": 0}, "capacity is at least 1, got 0"),
        ({"max_seconds": -1.0}, "at least 0, got -1.0"),
        ({"timeout_seconds": float("nan")}, "got .* nan"),
        ({"when_full": "drop"}, "to 'block' or to 'refuse', not 'drop'"),
    ],
)
def test_a_publisher_that_cannot_be_is_refused(options, match):
    with pytest.raises(InputError, match=match):
        BatchingPublisher(MemoryBroker(), **options)


def test_telemetry_comes_to_the_groups_and_to_this_process_in_order():
    broker = Gate()
    with TelemetryBus(broker, sender_id="run-1") as bus:
        heard = bus.subscribe(TOPIC)
        for i in range(1000):
            bus.publish(TOPIC, {"value": i})
        bus.publish(Topic.SEED_EVENT, {"value": "other"})
        assert [each.payload["value"] for each in heard.drain()] == list(range(1000))
    assert read(broker) == list(range(1000))
    assert bus.statistics.published == 1001
    assert bus.statistics.dropped == {}
    (other,) = broker.consumer("b", [Topic.SEED_EVENT], start="all").receive()
    assert (other.message.sender_id, other.message.key) == ("run-1", "run-1")


def test_telemetry_waits_for_nobody_and_drops_the_oldest_with_a_count():
    broker = Gate()
    broker.open.clear()
    bus = TelemetryBus(broker, sender_id="run", capacity=10, max_messages=4)
    bus.publish(TOPIC, {"value": -1})
    eventually(lambda: bus.statistics.waiting == 1 and not bus._queue)
    # The thread stands at the gate with the first one.
    for i in range(100):
        bus.publish(TOPIC, {"value": i})
    assert bus.statistics.waiting == 11
    assert bus.statistics.dropped == {DropReason.FULL: 90}
    broker.open.set()
    bus.close(30.0)
    assert read(broker) == [-1, *range(90, 100)]


def test_telemetry_goes_on_by_itself_when_the_bus_is_back():
    broker = Gate()
    broker.away = AWAY
    with TelemetryBus(broker, sender_id="run", max_seconds=0.01) as bus:
        for i in range(10):
            bus.publish(TOPIC, {"value": i})
        eventually(lambda: bus.statistics.failures)
        assert bus.statistics.last_error == str(AWAY)
        broker.away = None
        eventually(lambda: bus.statistics.published == 10)
    assert read(broker) == list(range(10))


class Odd(enum.StrEnum):
    A = "a"


class Hostile(dict):
    def __iter__(self):
        raise RuntimeError("not now")

    items = keys = __len__ = __getitem__ = __iter__


def test_telemetry_counts_what_cannot_be_told_and_raises_nothing():
    broker = Gate()
    loop: dict[str, object] = {}
    loop["value"] = loop
    with TelemetryBus(broker, sender_id="run") as bus:
        for payload in (
            {"value": object()}, {"value": float("nan")}, {"value": {1, 2}}, loop, Hostile(),
            {"value": "\ud800"}, {"value": "x" * MAX_MESSAGE_BYTES}, 7, None,
            {"value": threading.Lock()},
        ):  # fmt: skip
            bus.publish(TOPIC, {"value": "before"})
            bus.publish(TOPIC, payload)
        bus.publish("no topic at all", {"value": 1})
        bus.publish(TOPIC, {"value": [(1, 2), Odd.A], "more": {"a": (3,)}})
    assert bus.statistics.dropped == {DropReason.MALFORMED: 11}
    assert read(broker) == ["before"] * 10 + [[[1, 2], "a"]]


def test_telemetry_that_is_closed_while_the_bus_is_away_ends_and_counts():
    broker = Gate()
    broker.away = AWAY
    bus = TelemetryBus(broker, sender_id="run", max_messages=4)
    for i in range(10):
        bus.publish(TOPIC, {"value": i})
    bus.close(0.2)
    assert bus.statistics.dropped == {DropReason.CLOSED: 10}
    bus.publish(TOPIC, {"value": 1})
    bus.close(0.0)
    assert bus.statistics.dropped == {DropReason.CLOSED: 11}


def test_telemetry_that_is_closed_while_the_bus_hangs_ends_and_counts():
    broker = Gate()
    broker.open.clear()
    bus = TelemetryBus(broker, sender_id="run")
    bus.publish(TOPIC, {"value": 1})
    bus.close(0.1)
    assert bus.statistics.dropped == {DropReason.CLOSED: 1}
    broker.open.set()
    bus._thread.join(30.0)
    assert (bus.statistics.published, bus.statistics.waiting) == (0, 0)
    assert bus.statistics.dropped == {DropReason.CLOSED: 1}


def test_what_several_threads_tell_is_published_or_counted():
    broker = Gate()
    bus = TelemetryBus(broker, sender_id="run", capacity=50, max_seconds=0.001)
    threads = [
        threading.Thread(target=lambda: [bus.publish(TOPIC, {"value": i}) for i in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bus.close(60.0)
    found = bus.statistics
    assert found.published + sum(found.dropped.values()) == 8000
    assert len(read(broker)) == found.published


@pytest.mark.parametrize("options", [{"capacity": 0}, {"max_messages": 0}, {"max_seconds": 0.0}])
def test_telemetry_that_cannot_be_is_refused(options):
    with pytest.raises(InputError, match="at least 1 and max_seconds more than 0, got"):
        TelemetryBus(MemoryBroker(), sender_id="run", **options)


def test_telemetry_shares_the_bus_of_a_process():
    local = InProcessBus()
    heard = local.subscribe(TOPIC)
    with TelemetryBus(MemoryBroker(), sender_id="run", local=local) as bus:
        bus.publish(TOPIC, {"value": 1})
    assert len(heard.drain()) == 1

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.oona import InProcessBus, Topic


@given(
    st.lists(st.tuples(st.sampled_from(Topic), st.integers())),
    st.sets(st.sampled_from(Topic)),
)
def test_a_subscriber_gets_its_topics_in_order(published, topics):
    bus = InProcessBus()
    subscription = bus.subscribe(*topics)
    for topic, value in published:
        bus.publish(topic, {"value": value})
    got = subscription.drain()
    assert [(m.topic, m.payload["value"]) for m in got] == [p for p in published if p[0] in topics]
    assert [m.number for m in got] == sorted(m.number for m in got)
    assert subscription.drain() == []
    assert subscription.dropped == 0


def test_a_full_queue_drops_the_oldest_and_counts():
    bus = InProcessBus()
    slow, quick = bus.subscribe(Topic.METRICS, capacity=2), bus.subscribe(Topic.METRICS)
    for i in range(5):
        bus.publish(Topic.METRICS, {"i": i})
    assert [m.payload["i"] for m in slow.drain()] == [3, 4]
    assert slow.dropped == 3
    assert len(quick.drain()) == 5


def test_what_is_drained_by_another_thread_is_all_there():
    bus = InProcessBus()
    subscription = bus.subscribe(Topic.METRICS, capacity=200_000)
    writer = threading.Thread(
        target=lambda: [bus.publish(Topic.METRICS, {"i": i}) for i in range(50_000)]
    )
    got = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        writer.start()
        while writer.is_alive():
            got += subscription.drain()
        writer.join()
    finally:
        sys.setswitchinterval(interval)
    got += subscription.drain()
    assert [m.payload["i"] for m in got] == list(range(50_000))
    assert subscription.dropped == 0


def test_the_names_of_the_bus():
    import esper.oona

    for name in esper.oona.__all__:
        assert getattr(esper.oona, name).__module__.startswith(("esper.oona", "esper.contracts"))
    assert set(esper.oona.__all__) >= {
        "BatchingPublisher", "Broker", "Bus", "Consumer", "InProcessBus", "MemoryBroker",
        "RedisBroker", "SqliteBroker", "TelemetryBus", "Topic", "TopicNames", "open_broker",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="has no attribute 'KafkaBroker'"):
        esper.oona.KafkaBroker  # noqa: B018

"""Publishing, receiving, settling, dying and time, in any order, against a model of each group."""

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from esper.errors import LeaseLostError
from esper.oona import Broker, Consumer, Delivery
from tests.esper.oona_brokers import TOPIC, Clock, MemoryKind, RedisKind, SqliteKind, message

LEASE = 10.0
MAX_DELIVERIES = 4
KEYS = "abcd"


class Group:
    """What a group is to have seen."""

    def __init__(self) -> None:
        self.attempts: dict[int, int] = {}
        self.settled: set[int] = set()


class Reader:
    """A consumer, and what it holds."""

    def __init__(self, group: str, consumer: Consumer, now: float) -> None:
        self.group = group
        self.consumer = consumer
        self.held: dict[int, Delivery] = {}
        self.called = now


class BrokerMachine(RuleBasedStateMachine):
    """Three keys or more on two partitions, two groups, and consumers that come and go."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.clock: Clock = kind.clock
        self.broker: Broker = kind.open(partitions=2)
        self.keys: list[str] = []
        self.groups = {"one": Group(), "two": Group()}
        self.readers: list[Reader] = []
        self.gone: list[Reader] = []
        """Who said nothing when they ended; their leases may still run."""
        self.names = itertools.count()

    @initialize()
    def begin(self) -> None:
        for group in self.groups:
            self.broker.consumer(group, [TOPIC], name="first").close()

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6), again=st.booleans())
    def publish(self, keys: list[str], again: bool) -> None:
        first = len(self.keys)
        batch = [message(first + i, key) for i, key in enumerate(keys)]
        self.keys += keys
        for _ in range(1 + again):
            self.broker.publish(batch)

    @rule(group=st.sampled_from(["one", "two"]))
    @precondition(lambda self: len(self.readers) < 4)
    def join(self, group: str) -> None:
        consumer = self.broker.consumer(
            group, [TOPIC], name=f"reader-{next(self.names)}", lease_seconds=LEASE,
            max_deliveries=MAX_DELIVERIES,
        )  # fmt: skip
        self.readers.append(Reader(group, consumer, self.clock.now))

    @rule(data=st.data(), most=st.integers(1, 8))
    @precondition(lambda self: self.readers)
    def receive(self, data: st.DataObject, most: int) -> None:
        self.receive_by(data.draw(st.sampled_from(self.readers)), most)

    def receive_by(self, reader: Reader, most: int) -> list[Delivery]:
        group = self.groups[reader.group]
        self.forget_expired(reader)
        got = reader.consumer.receive(most)
        assert len(got) <= most
        reader.called = self.clock.now
        self.bury(reader.group)
        if any(each.attempt >= 3 for each in got):
            assert len(got) == 1
        for each in got:
            number = each.message.payload["value"]
            assert number not in group.settled
            assert self.keys[number] == each.message.key
            group.attempts[number] = group.attempts.get(number, 0) + 1
            assert each.attempt == group.attempts[number] <= MAX_DELIVERIES
            for other in (*self.readers, *self.gone):
                if other is not reader and other.group == reader.group:
                    # A lease is renewed by a call when a quarter of it is over.
                    kept = self.clock.now < other.called + 0.75 * LEASE
                    assert not (kept and number in other.held)
            reader.held[number] = each
            for older in range(number):
                if self.keys[older] == each.message.key:
                    assert older in group.settled or older in reader.held
        return got

    def forget_expired(self, reader: Reader) -> None:
        # What it holds may be another's by now, and is no reason for it to come first.
        if self.clock.now >= reader.called + 0.75 * LEASE:
            reader.held = {}

    def bury(self, group: str) -> None:
        for letter in self.broker.dead_letters(limit=10_000):
            if letter.group == group:
                assert letter.message is not None
                self.groups[group].settled.add(letter.message.payload["value"])

    @rule(data=st.data(), how=st.sampled_from(["acknowledge", "give_back", "reject"]))
    @precondition(lambda self: any(reader.held for reader in self.readers))
    def settle(self, data: st.DataObject, how: str) -> None:
        reader = data.draw(st.sampled_from([each for each in self.readers if each.held]))
        self.forget_expired(reader)
        if not reader.held:
            return
        chosen = data.draw(st.lists(st.sampled_from(sorted(reader.held)), unique=True, min_size=1))
        deliveries = [reader.held.pop(number) for number in chosen]
        getattr(reader.consumer, how)(deliveries, *(["why not"] if how == "reject" else []))
        reader.called = self.clock.now
        if how != "give_back":
            self.groups[reader.group].settled.update(chosen)

    @rule(data=st.data(), politely=st.booleans())
    @precondition(lambda self: self.readers)
    def end(self, data: st.DataObject, politely: bool) -> None:
        reader = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        if politely:
            reader.consumer.close()
        else:
            self.gone.append(reader)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 7.0, 11.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(data=st.data())
    @precondition(lambda self: self.gone)
    def wake(self, data: st.DataObject) -> None:
        """One that was taken for dead says at last that it is done."""
        reader = data.draw(st.sampled_from(self.gone))
        number = next(iter(reader.held), None)
        if number is None:
            return
        taken = [other for other in self.readers if number in other.held]
        group = self.groups[reader.group]
        before = number in group.settled
        try:
            reader.consumer.acknowledge([reader.held.pop(number)])
        except LeaseLostError:
            return
        assert not any(other.group == reader.group for other in taken)
        if not before:
            group.settled.add(number)
        reader.called = self.clock.now

    def teardown(self) -> None:
        for reader in self.readers:
            reader.held = {}
        self.gone, self.readers = [], []
        self.clock.advance(10 * LEASE)
        for name, group in self.groups.items():
            last = self.broker.consumer(name, [TOPIC], lease_seconds=LEASE, max_deliveries=100)
            while got := last.receive(100):
                for each in got:
                    number = each.message.payload["value"]
                    assert number not in group.settled
                    group.settled.add(number)
                last.acknowledge(got)
            self.bury(name)
            assert group.settled == set(range(len(self.keys)))
            found = self.broker.statistics().group(name, TOPIC)
            assert (found.lag, found.pending) == (0, 0)
        self.kind.close()


@pytest.mark.parametrize("store", ["memory", "sqlite", "redis"])
def test_no_order_of_events_breaks_what_a_bus_promises(store, tmp_path, request):
    numbers = itertools.count()
    url = request.getfixturevalue("redis_url") if store == "redis" else ""

    def make() -> BrokerMachine:
        number = next(numbers)
        if store == "memory":
            return BrokerMachine(MemoryKind())
        if store == "sqlite":
            return BrokerMachine(SqliteKind(tmp_path / f"bus-{number}.sqlite"))
        return BrokerMachine(RedisKind(url, name=f"bus-{number}"))

    run_state_machine_as_test(make, settings=settings(stateful_step_count=40))

"""Everything dies at some moment: nothing that was acknowledged is lost, and all goes on by itself.

KILLED_ROUNDS says how many rounds of killing there are; 200 make a thorough look.
"""

import contextlib
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from esper.contracts import Topic
from esper.errors import AccessDeniedError, BusError, InputError, ServiceUnavailableError
from esper.oona import BatchingPublisher, RedisBroker, SqliteBroker, TelemetryBus, open_broker
from tests.esper.oona_brokers import TOPIC, SqliteKind, message, messages, values
from tests.esper.servers._redis import start_redis
from tests.esper.tcp_proxy import Proxy

ROUNDS = int(os.environ.get("KILLED_ROUNDS", "8"))

PROMISED = {
    "lost": 0,
    "never_received": 0,
    "kept_twice": 0,
    "stored_out_of_order": 0,
    "received_out_of_order": 0,
    "first_deliveries_twice": 0,
    "left": 0,
    "dead": 0,
    "failed": [],
}


def killing(url: str, folder: Path) -> "subprocess.Popen[str]":
    folder.mkdir()
    script = Path(__file__).with_name("oona_process.py")
    return subprocess.Popen(
        [sys.executable, str(script), url, str(folder), str(ROUNDS), "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check(process: "subprocess.Popen[str]") -> None:
    out, errors = process.communicate(timeout=60 + 5 * ROUNDS)
    assert process.returncode == 0, errors
    found = json.loads(out)
    assert {key: found.get(key) for key in PROMISED} == PROMISED, found
    assert found["published"] > 10 * ROUNDS
    assert found["lives"] > 8 + ROUNDS


def test_publishers_and_consumers_of_a_file_are_killed(tmp_path):
    check(killing(f"sqlite:{tmp_path / 'bus.sqlite'}", tmp_path / "logs"))


def test_publishers_consumers_and_the_redis_server_are_killed(tmp_path):
    chance = random.Random(2)
    server = start_redis(tmp_path, fsync="always")
    try:
        process = killing(server.url, tmp_path / "logs")
        killed = 0
        while process.poll() is None and killed < max(3, ROUNDS // 6):
            time.sleep(0.5 + chance.random())
            server.kill()
            time.sleep(chance.random() * 0.3)
            server.start()
            killed += 1
        check(process)
        assert killed >= 3
    finally:
        server.stop()


@pytest.fixture
def proxy(redis_server, redis_url):
    with Proxy(int(redis_server.url.rpartition(":")[2].partition("/")[0])) as own:
        own.url = f"redis://127.0.0.1:{own.port}/0"
        yield own


def test_what_is_on_a_line_that_is_cut_goes_on_when_it_is_mended(proxy):
    options = {"timeout_seconds": 0.2, "patience_seconds": 60.0}
    with RedisBroker(proxy.url, **options) as broker:
        consumer = broker.consumer("a", [TOPIC])
        found: list[int] = []

        def read() -> None:
            while len(found) < 200:
                got = consumer.receive(8, 0.1)
                found.extend(values(got))
                consumer.acknowledge(got)

        reader = threading.Thread(target=read)
        reader.start()
        with BatchingPublisher(broker, max_messages=5) as publisher:
            for each in messages(200, keys=1):
                if each.payload["value"] in (50, 100, 150):
                    proxy.cut()
                    time.sleep(0.5)
                    proxy.mend()
                publisher.publish(each)
        reader.join(60.0)
        assert found == list(range(200))
        assert broker.statistics().group("a", TOPIC).pending == 0


def test_answers_that_get_lost_lose_and_repeat_nothing(proxy):
    options = {"timeout_seconds": 0.2, "patience_seconds": 30.0}
    with RedisBroker(proxy.url, **options) as broker:
        consumer = broker.consumer("a", [TOPIC])
        proxy.swallow_answers()
        broker.publish(messages(10))
        assert broker.statistics().length == 10
        got = consumer.receive(3)
        proxy.swallow_answers()
        again = consumer.receive(3)
        assert [*values(got), *values(again)] == [0, 1, 2, 3, 4, 5]
        assert {each.attempt for each in (*got, *again)} == {1}
        for call in (
            lambda: consumer.acknowledge(got),
            lambda: consumer.give_back(again[:1]),
            lambda: consumer.reject(again[1:2], "no"),
        ):
            proxy.swallow_answers()
            call()
        assert len(broker.dead_letters()) == 1
        assert [(each.attempt, *values([each])) for each in consumer.receive()] == [
            (2, 3), (1, 6), (1, 7), (1, 8), (1, 9),
        ]  # fmt: skip


def test_a_server_that_is_away_is_said_and_asked_again_by_the_next_call(tmp_path):
    server = start_redis(tmp_path)
    try:
        with RedisBroker(server.url, patience_seconds=0.2) as broker:
            consumer = broker.consumer("a", [TOPIC])
            broker.publish(messages(1))
            server.kill()
            where = server.url.removeprefix("redis://").removesuffix("/0")
            for call in (lambda: broker.publish(messages(1)), consumer.receive):
                with pytest.raises(
                    ServiceUnavailableError, match=f"{where} could not be reached for 0.2 s .*again"
                ):
                    call()
            server.start()
            assert values(consumer.receive()) == [0]
            broker.publish([message(1)])
            assert values(consumer.receive()) == [1]
    finally:
        server.stop()


def test_a_server_that_keeps_nothing_is_joined_again(tmp_path):
    server = start_redis(tmp_path)
    try:
        with RedisBroker(server.url) as broker:
            consumer = broker.consumer("a", [TOPIC])
            broker.publish(messages(3))
            held = consumer.receive(2)
            broker._store._server.client.flushall()
            broker.publish(messages(3, first=10))
            consumer.acknowledge(held)
            assert values(consumer.receive()) == [10, 11, 12]
    finally:
        server.stop()


@pytest.mark.parametrize("first", ["receive", "consumer", "publish", "statistics"])
def test_whoever_calls_first_a_server_that_kept_nothing_has_a_whole_bus(redis_url, first):
    import redis

    with RedisBroker(redis_url, partitions=3) as broker, redis.Redis.from_url(redis_url) as client:
        consumer = broker.consumer("a", [TOPIC])
        broker.publish(messages(1))
        client.flushdb()
        calls = {
            "receive": consumer.receive,
            "consumer": lambda: broker.consumer("b", [TOPIC]).close(),
            "publish": lambda: broker.publish(messages(1)),
            "statistics": broker.statistics,
        }
        for call in (calls.pop(first), *calls.values()):
            call()
        assert broker.statistics().group("a", TOPIC).consumers == 1
        with RedisBroker(redis_url) as other:
            assert other._store.partitions == 3
            other.publish(messages(1, first=1))
        assert values(consumer.receive())[-1:] == [1]


def test_topics_that_a_newer_version_brought_to_a_bus_are_left_out(redis_url):
    import redis

    with RedisBroker(redis_url) as broker, redis.Redis.from_url(redis_url) as client:
        consumer = broker.consumer("a", [TOPIC])
        broker.publish(messages(1))
        consumer.reject(consumer.receive(), "no")
        before = broker.statistics()
        letters = broker.dead_letters()
        assert len(letters) == 1
        # As a newer version leaves them.
        client.sadd("esper:topics", "training.dreams")
        client.hset("esper:training.dreams:meta", "length", "1")
        client.zadd("esper:training.dreams:letters", {"7": 7.0})
        client.hset(
            "esper:letter:7",
            mapping={"topic": "training.dreams", "group": "a", "reason": "no", "attempts": 1,
                     "at": "1.0", "body": "{}"},
        )  # fmt: skip
        assert broker.statistics() == before
        assert broker.dead_letters() == letters


def test_a_server_that_lets_nobody_in_is_said_without_the_password(tmp_path):
    import redis

    server = start_redis(tmp_path)
    try:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", "correct")
        where = server.url.removeprefix("redis://")
        with pytest.raises(AccessDeniedError, match="lets nobody in .* into the URL") as caught:
            RedisBroker(f"redis://:wrong-one@{where}")
        assert "wrong-one" not in str(caught.value)
        with pytest.raises(AccessDeniedError):
            RedisBroker(server.url)
        with RedisBroker(f"redis://:correct@{where}") as broker:
            broker.publish(messages(1))
    finally:
        server.stop()


def test_a_server_without_memory_refuses_and_loses_nothing(tmp_path):
    import redis

    server = start_redis(tmp_path)
    try:
        with RedisBroker(server.url) as broker, redis.Redis.from_url(server.url) as client:
            consumer = broker.consumer("a", [TOPIC])
            broker.publish(messages(2))
            client.config_set("maxmemory", "1")
            with pytest.raises(BusError, match=r"refuses \(.*maxmemory.*\): look at its log"):
                broker.publish(messages(1, first=2))
            client.config_set("maxmemory", "0")
            broker.publish(messages(1, first=2))
            assert values(consumer.receive()) == [0, 1, 2]
    finally:
        server.stop()


@pytest.fixture
def small_server(tmp_path):
    """A server with room for about 70 messages of `large`."""
    import redis

    server = start_redis(tmp_path, fsync="everysec")
    try:
        with redis.Redis.from_url(server.url) as client:
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory", str(used + 1_500_000))
        yield server
    finally:
        server.stop()


def large(number, topic=TOPIC):
    return message([number, "x" * 20_000], f"key-{number % 3}", topic)


def numbers(deliveries):
    return [number for number, _ in values(deliveries)]


@pytest.mark.parametrize("full", ["drop", "refuse"])
def test_what_all_have_acknowledged_makes_room_in_a_server_without_memory(small_server, full):
    with RedisBroker(small_server.url, full=full) as broker:
        consumer = broker.consumer("a", [TOPIC])
        for number in range(250):
            broker.publish([large(number)])
            got = consumer.receive()
            assert numbers(got) == [number]
            consumer.acknowledge(got)
        found = broker.statistics()
        assert found.dropped == 0
        assert 1 <= found.length < 150


def test_a_server_that_is_full_of_unread_messages_goes_on_when_they_are_read(small_server):
    with RedisBroker(small_server.url, full="refuse") as broker:
        with broker.consumer("a", [TOPIC]):
            pass
        count = 0

        def fill() -> None:
            nonlocal count
            for count in range(1000):
                broker.publish([large(count)])

        with pytest.raises(
            BusError, match=r"refuses \(.*maxmemory.*\): look at its log, its memory"
        ):
            fill()
        assert 20 < count < 150
        # All that a reader does, from its opening of the bus on, works where there is no room.
        with RedisBroker(small_server.url) as other:
            consumer = other.consumer("a", [TOPIC])
            consumer.give_back(consumer.receive(4))
            got = consumer.receive(1000)
            consumer.renew()
            assert sorted(numbers(got)) == list(range(count))
            consumer.reject(got[:1], "no")
            consumer.acknowledge(got[1:])
            assert other.redrive(other.dead_letters()) == 1
            again = consumer.receive()
            assert numbers(again) == numbers(got[:1])
            consumer.acknowledge(again)
            other.remove_group("none")
        broker.publish([large(count)])
        assert broker.statistics().dropped == 0


def test_a_bus_that_drops_makes_room_by_the_oldest_of_its_topic(small_server):
    with RedisBroker(small_server.url) as broker:
        consumer = broker.consumer("a", [TOPIC, Topic.HEALTH])
        broker.publish([large(-1, Topic.HEALTH)])
        for number in range(200):
            broker.publish([large(number)])
            # Which of two partitions has the older one is told to the millisecond.
            time.sleep(0.002)
        found = broker.statistics()
        assert found.topic(Topic.HEALTH).dropped == 0
        left = 200 - found.topic(TOPIC).dropped
        assert 20 < left < 150
        assert sorted(numbers(consumer.receive(1000))) == [-1, *range(200 - left, 200)]


def test_telemetry_does_not_wait_for_a_server_that_does_not_answer(proxy):
    with RedisBroker(proxy.url, timeout_seconds=0.2, patience_seconds=0.2) as broker:
        bus = TelemetryBus(broker, sender_id="run", capacity=100)
        proxy.cut()
        for i in range(1000):
            bus.publish(TOPIC, {"value": i})
        assert bus.statistics.waiting >= 100
        proxy.mend()
        bus.close(30.0)
        found = bus.statistics
        assert found.published + sum(found.dropped.values()) == 1000
        assert found.published >= 100


def test_a_full_disk_refuses_and_loses_nothing(small_disk):
    place = small_disk(1024)
    with SqliteBroker(place / "bus.sqlite") as broker:
        consumer = broker.consumer("a", [TOPIC])
        taken = 0

        def fill() -> None:
            nonlocal taken
            for taken in range(1000):
                broker.publish([message([taken, "x" * 20_000])])

        with pytest.raises(BusError, match="the disk is full: make room and try again"):
            fill()
        with pytest.raises(BusError, match="does not work"):
            broker.publish([message([taken, "x" * 200_000])])
        subprocess.run(["mount", "-o", "remount,size=32m", str(place)], check=True)
        broker.publish([message([taken, ""])])
        got = []
        while some := consumer.receive(64):
            got += some
            consumer.acknowledge(some)
        assert [each.message.payload["value"][0] for each in got] == list(range(taken + 1))


@pytest.fixture
def refusing(tmp_path):
    """A bus on a file that takes no dead letters, and how it is made to take them again."""
    path = tmp_path / "bus.sqlite"
    kind = SqliteKind(path)
    with contextlib.closing(sqlite3.connect(path)) as other:
        broker = kind.open()
        refuse = "BEFORE INSERT ON letters BEGIN SELECT RAISE(ABORT, 'no room'); END"
        other.execute(f"CREATE TRIGGER refuse {refuse}")
        yield kind, broker, lambda: other.execute("DROP TRIGGER refuse")
    kind.close()


def test_a_message_that_cannot_be_buried_costs_no_other_and_is_buried_later(refusing):
    kind, broker, allow = refusing
    consumer = broker.consumer("a", [TOPIC])
    broker.publish([message(0)])
    kind.spoil(broker, TOPIC, "", b"no JSON")
    broker.publish([message(2)])
    got = consumer.receive()
    assert values(got) == [0, 2]
    consumer.acknowledge(got)
    broker.publish([message(3)])
    with pytest.raises(BusError, match="no room"):
        consumer.receive()
    assert broker.statistics().group("a", TOPIC).pending == 1
    allow()
    got = consumer.receive()
    assert values(got) == [3]
    consumer.acknowledge(got)
    assert [letter.body for letter in broker.dead_letters()] == [b"no JSON"]
    assert broker.statistics().group("a", TOPIC).pending == 0


def test_a_message_that_cannot_be_buried_for_the_third_time_holds_nothing_up_for_ever(refusing):
    kind, broker, allow = refusing
    broker.consumer("a", [TOPIC]).close()
    kind.spoil(broker, TOPIC, "", b"no JSON")
    for _ in range(2):
        with broker.consumer("a", [TOPIC]) as early, pytest.raises(BusError, match="no room"):
            early.receive()
    consumer = broker.consumer("a", [TOPIC])
    with pytest.raises(BusError, match="no room"):
        consumer.receive()
    broker.publish([message(1)])
    allow()
    assert values(consumer.receive()) == [1]
    assert [letter.attempts for letter in broker.dead_letters()] == [3]


def test_a_consumer_on_a_full_disk_goes_on_when_there_is_room(small_disk):
    place = small_disk(2048)
    with SqliteBroker(place / "bus.sqlite") as broker:
        consumer = broker.consumer("a", [TOPIC])
        broker.publish(messages(500, keys=3))
        filler = place / "filler"
        _fill(filler)
        found, refused = [], 0
        while len(found) < 500:
            try:
                got = consumer.receive(200)
                consumer.acknowledge(got)
                found += values(got)
            except BusError:
                refused += 1
                filler.unlink(missing_ok=True)
        assert sorted(set(found)) == list(range(500))
        assert refused


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 1024)
        except OSError:
            pass


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"no database at all, but a text that is long enough" * 50, "is no database, and no bus"),
        (None, "is a database, but no bus of Esper's: choose another file"),
    ],
)
def test_a_file_that_is_no_bus_is_left_as_it_is(tmp_path, content, match):
    path = tmp_path / "other"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE mine (x)")
        other.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(InputError, match=match):
        SqliteBroker(path)
    if content is not None:
        assert path.read_bytes() == before


def test_a_bus_of_a_newer_version_is_refused(tmp_path, redis_url):
    import redis

    from esper.errors import SchemaVersionError

    path = tmp_path / "bus.sqlite"
    SqliteBroker(path).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version=7")
    other.close()
    with pytest.raises(SchemaVersionError, match=r"version 7, .* knows version 1: .* Update Esper"):
        SqliteBroker(path)
    RedisBroker(redis_url, name="mine").close()
    with redis.Redis.from_url(redis_url) as client:
        client.hset("mine:settings", "version", "7")
    with pytest.raises(SchemaVersionError, match=r"'mine' on .* version 7, .* knows version 1"):
        RedisBroker(redis_url, name="mine")


def test_topics_of_a_newer_version_are_left_out_of_what_a_file_tells(tmp_path):
    path = tmp_path / "bus.sqlite"
    with SqliteBroker(path) as broker:
        consumer = broker.consumer("a", [TOPIC])
        broker.publish(messages(1))
        consumer.reject(consumer.receive(), "no")
        with contextlib.closing(sqlite3.connect(path)) as newer, newer:
            newer.execute("INSERT INTO topics (number, topic) VALUES (99, 'future.topic')")
            newer.execute("INSERT INTO cursors VALUES ('a', 99 * 8, 0, '', 0, 0)")
            newer.execute("INSERT INTO letters VALUES (0, 99, 'a', 'no', 1, 0, x'')")
        assert [own.topic for own in broker.statistics().topics] == [TOPIC]
        assert [own.topic for own in broker.statistics().groups] == [TOPIC]
        assert [letter.topic for letter in broker.dead_letters(limit=1)] == [TOPIC]


def test_a_bus_has_the_partitions_that_it_began_with(tmp_path, redis_url):
    for url in (f"sqlite:{tmp_path / 'bus.sqlite'}", redis_url):
        open_broker(url, partitions=3).close()
        open_broker(url).close()
        with pytest.raises(InputError, match="have 3 partitions each, and not 4"):
            open_broker(url, partitions=4)


def test_two_buses_of_one_server_know_nothing_of_each_other(redis_url):
    with RedisBroker(redis_url, name="one") as one, RedisBroker(redis_url, name="two") as two:
        consumer = two.consumer("a", [TOPIC])
        one.publish(messages(1))
        assert consumer.receive() == []
        assert two.statistics().length == 0


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("", "'' names no bus: expected memory:, sqlite:PATH or redis://HOST"),
        ("kafka://host", "kafka: names no bus"),
        ("memory:name", "memory: names no bus"),
        ("sqlite:", "sqlite: names no bus"),
        ("redis:host", "redis: names no bus"),
        ("redis://host:port/0", "no URL of a Redis server: .*; write redis://HOST:PORT/NUMBER"),
        ("redis://localhost:1/0?foo=1", "no URL of a Redis server: .* options that redis-py knows"),
        ("sqlite:bus?sync=full", "asks for sync: a bus on a file knows synchronous=full alone"),
    ],
)
def test_a_url_that_names_no_bus_is_refused(url, match):
    with pytest.raises(InputError, match=match):
        open_broker(url)


def test_a_password_that_is_written_wrongly_is_not_said():
    with pytest.raises(InputError, match="in a password %2F for /") as caught:
        open_broker("redis://user:dark/secret@host")
    assert caught.value.__cause__ is None
    assert "dark" not in str(caught.value)


def test_urls_name_buses(tmp_path, redis_url):
    path = tmp_path / "bus.sqlite"
    for url in ("memory:", f"sqlite:{path}?synchronous=full", f"sqlite:///{path}", redis_url):
        with open_broker(url, capacity=10) as broker:
            consumer = broker.consumer("a", [TOPIC])
            broker.publish(messages(1))
            got = consumer.receive()
            assert values(got) == [0]
            consumer.acknowledge(got)
    assert path.exists()


def test_a_server_is_found_by_its_socket_too(tmp_path):
    server = start_redis(tmp_path)
    try:
        with open_broker(f"unix://{tmp_path / 'redis.sock'}", patience_seconds=0.1) as broker:
            broker.publish(messages(1))
            server.kill()
            with pytest.raises(ServiceUnavailableError, match=r"redis\.sock could not be reached"):
                broker.publish(messages(1))
    finally:
        server.stop()


def test_a_path_that_cannot_be_a_bus_is_said(tmp_path):
    with pytest.raises(BusError, match="it is a folder: name a file in it"):
        SqliteBroker(tmp_path)
    with pytest.raises(InputError, match="there is no folder .* make it first"):
        SqliteBroker(tmp_path / "no" / "bus")


def test_a_port_where_nobody_listens_is_said():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(ServiceUnavailableError, match=f"127.0.0.1:{port} could not be reached"):
            RedisBroker(f"redis://127.0.0.1:{port}/0", patience_seconds=0.1)
        # Who has something else to do waits for as long as is asked, whatever calls are given.
        with pytest.raises(ServiceUnavailableError, match=r"could not be reached for 0\.05 s"):
            open_broker(
                f"redis://127.0.0.1:{port}/0", opening_seconds=0.05, patience_seconds=3600.0
            )


@pytest.mark.parametrize("name", ["timeout_seconds", "patience_seconds", "opening_seconds"])
@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_waits_that_are_none_are_refused(name, seconds):
    with pytest.raises(InputError, match=f"timeout_seconds is more than 0, .*got .*{seconds}"):
        RedisBroker("redis://127.0.0.1:1/0", **{name: seconds})


def test_the_broker_of_a_server_is_imported_by_those_who_use_it():
    script = "import esper.oona, esper.cli._grow, sys; print('redis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr

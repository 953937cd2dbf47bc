"""Publishers and consumers that are killed: `python oona_process.py URL FOLDER ROUNDS SEED`.

Four processes publish and four read in one group, until each is killed at a random moment, and
another begins in its place. What a publisher was told is published, and what a consumer got, they
write to files of their own. In the end the rest is read, and a line of JSON says what was found.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from esper.contracts import OonaMessage, Topic
from esper.errors import BusError, LeaseLostError, ServiceUnavailableError
from esper.oona import Broker, open_broker

PUBLISHERS = 4
CONSUMERS = 4
TOPICS = (Topic.METRICS, Topic.SEED_EVENT)
LEASE = 1.0
OPTIONS = {"capacity": 1_000_000, "full": "refuse"}


def publish(url: str, log: int, chance: random.Random, life: int) -> None:
    """Publish for ever; a line for each message that was taken."""
    broker, numbers = open_broker(url, **OPTIONS), Counter[str]()
    while True:
        batch: list[OonaMessage] = []
        for _ in range(chance.randint(1, 12)):
            key = f"{life}-{chance.randrange(4)}"
            payload = {"n": numbers[key]}
            numbers[key] += 1
            topic = TOPICS[len(key) % 2]
            batch.append(OonaMessage(topic=topic, key=key, sender_id="p", payload=payload))
        while True:
            try:
                broker.publish(batch)
                break
            except ServiceUnavailableError:
                continue  # again, whether it came about or not
        os.write(log, "".join(f"{m.key} {m.payload['n']}\n" for m in batch).encode())
        time.sleep(chance.random() * 0.01)


def consume(url: str, log: int, chance: random.Random, life: int) -> None:
    """Read for ever; a line for each message that came: when, for which time, and which."""
    broker = open_broker(url, **OPTIONS)
    consumer = join(broker, f"life-{life}")
    while True:
        try:
            read(consumer, log, chance, 0.05)
        except (ServiceUnavailableError, LeaseLostError):
            continue


def join(broker: Broker, name: str):
    while True:
        with contextlib.suppress(ServiceUnavailableError):
            return broker.consumer(
                "readers", TOPICS, name=name, lease_seconds=LEASE, max_deliveries=1000
            )


def read(consumer, log: int, chance: random.Random, wait: float) -> int:
    got = consumer.receive(chance.randint(1, 40), wait)
    now = time.monotonic_ns()
    lines = [f"{now} {d.attempt} {d.message.key} {d.message.payload['n']}\n" for d in got]
    os.write(log, "".join(lines).encode())
    came = len(got)
    if chance.random() < 0.1:
        back = len(got) // 2
        # The newer half, so that what has one key stays in order.
        consumer.give_back(got[back:])
        got = got[:back]
    if chance.random() < 0.2:
        time.sleep(chance.random() * 0.02)
    consumer.acknowledge(got)
    return came


def start(number: int, url: str, folder: Path, seed: int) -> int:
    """A process in one of the eight places."""
    pid = os.fork()
    if pid == 0:
        try:
            chance = random.Random(seed)
            publishing = number < PUBLISHERS
            kind = "published" if publishing else "received"
            log = os.open(folder / f"{kind}-{seed}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            (publish if publishing else consume)(url, log, chance, seed)
        except BaseException:
            (folder / f"failed-{seed}").write_text(traceback.format_exc())
        os._exit(1)
    return pid


def lines_of(folder: Path, kind: str) -> list[list[str]]:
    # Of a line that was cut short nobody was told.
    return [
        line.split()
        for path in sorted(folder.glob(f"{kind}-*"))
        for line in path.read_text().split("\n")[:-1]
    ]


def verdict(url: str, folder: Path) -> dict[str, object]:
    """Read what is left, and compare what was published with what came."""
    chance = random.Random(0)
    log = os.open(folder / "received-last", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with open_broker(url, **OPTIONS) as broker:
        last = join(broker, "last")
        empty = 0
        # Leases of those that were killed run out first.
        while empty < 3:
            empty = 0 if read(last, log, chance, LEASE) else empty + 1
        audit = broker.consumer("audit", TOPICS)
        stored: list[tuple[str, int]] = []
        while got := audit.receive(1000):
            stored += [(each.message.key, each.message.payload["n"]) for each in got]
            audit.acknowledge(got)
        statistics = broker.statistics()
        dead = len(broker.dead_letters())
    published = {(key, int(n)) for key, n in lines_of(folder, "published")}
    rows = [(int(at), key, int(n), int(a)) for at, a, key, n in lines_of(folder, "received")]
    # What came in one call has one time, and stays as it came.
    received = sorted(rows, key=lambda row: row[0])
    numbers: dict[str, list[int]] = {}
    for key, n in stored:
        numbers.setdefault(key, []).append(n)
    first: dict[str, list[int]] = {}
    for _, key, n, _ in received:
        own = first.setdefault(key, [])
        if n not in own[-200:] and n not in own:
            own.append(n)
    once = Counter((key, n) for _, key, n, attempt in received if attempt == 1)
    own = [group for group in statistics.groups if group.group == "readers"]
    return {
        "published": len(published),
        "stored": len(stored),
        "deliveries": len(received),
        "lost": len(published - set(stored)),
        "never_received": len(set(stored) - {(key, n) for _, key, n, _ in received}),
        "kept_twice": sum(len(own) != len(set(own)) for own in numbers.values()),
        "stored_out_of_order": sum(own != list(range(len(own))) for own in numbers.values()),
        "received_out_of_order": sum(own != sorted(own) for own in first.values()),
        "first_deliveries_twice": sum(count > 1 for count in once.values()),
        "left": sum(group.lag + group.pending for group in own),
        "dead": dead,
        "failed": [path.read_text() for path in folder.glob("failed-*")],
    }


def main() -> None:
    url, folder, rounds, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    chance = random.Random(seed)
    with open_broker(url, **OPTIONS) as broker:
        # From the beginning, so that nothing counts as read before it was looked at.
        for group in ("audit", "readers"):
            broker.consumer(group, TOPICS).close()
    lives = 0
    pids: list[int] = []
    for number in range(PUBLISHERS + CONSUMERS):
        lives += 1
        pids.append(start(number, url, folder, lives))
    for _ in range(rounds):
        time.sleep(chance.random() * 0.25)
        for number in chance.sample(range(len(pids)), chance.choice((1, 1, 1, 2, 4))):
            os.kill(pids[number], signal.SIGKILL)
            os.waitpid(pids[number], 0)
            lives += 1
            pids[number] = start(number, url, folder, lives)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    try:
        found = verdict(url, folder)
    except BusError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps({"lives": lives, **found}) + "\n")


if __name__ == "__main__":
    main()

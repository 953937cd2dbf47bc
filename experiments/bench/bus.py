"""What the bus carries: `python -m experiments.bench.bus`.

Each bus takes messages of 1, 8 and 64 publishers, which are threads of this process, one at a time
and in batches of 64, and one consumer reads them all: messages published in a second, and messages
that came through, from the first call to the last acknowledgement. Then they are published at 2,000
a second by batches of what has come due each millisecond, and each message is timed from before it
is published until it is received. Everything runs on the one core, the consumer, the publishers and
the Redis server too, so that figures are of the whole and none is hidden in another core.

Last, a training loop with `esper grow --bus` against the same without: the time of a stretch of
steps at the default rate of boundaries, with telemetry that goes to a file on and off by turns.
"""

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esper.contracts import OonaMessage, Topic
from esper.oona import Broker, InProcessBus, MemoryBroker, SqliteBroker, TelemetryBus
from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Call, Sampling, contest
from experiments.bench._results import Check, Figure, Results

Open = Callable[[], Broker]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets of the design (§8)."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    publishers: tuple[int, ...] = (1, 8, 64)
    batch: int = 64
    keys: int = 64
    rate: int = 2_000
    """Messages a second, where they are paced."""
    least_memory: float = 50_000.0
    """Messages a second of the bus in memory."""
    least_durable: float = 20_000.0
    """Of the bus on a file, and of the one on Redis, in batches."""
    most_milliseconds: float = 5.0
    """The 99th percentile of the latency, paced."""
    publish_microseconds: float = 2.0
    """Of `TelemetryBus.publish`, which a training loop waits for."""
    training_ratio: float = 1.02
    steps: int = 200
    """Of one timing of the training loop."""

    @property
    def messages(self) -> int:
        """Of one measurement."""
        return 20_000 if self.sampling.rounds >= Sampling().rounds else 4_000

    @property
    def seconds(self) -> float:
        """How long messages are paced."""
        return 10.0 if self.sampling.rounds >= Sampling().rounds else 2.0


def make_messages(count: int, keys: int) -> list[OonaMessage]:
    """Measurements of a small run."""
    return [
        OonaMessage(
            topic=Topic.METRICS,
            key=f"run-{i % keys}",
            sender_id="bench",
            payload={"step": i, "train_loss": 0.25, "stages": [[0, 2], [0, 0]], "seconds": {}},
        )
        for i in range(count)
    ]


def carry(
    broker: Broker, messages: Sequence[OonaMessage], publishers: int, batch: int
) -> tuple[float, float, int]:
    """Publish from threads and read it all: seconds of both, and how many came."""
    consumer = broker.consumer("bench", [Topic.METRICS])
    parts = [messages[number::publishers] for number in range(publishers)]
    ready = threading.Barrier(publishers + 1)

    def publish(own: Sequence[OonaMessage]) -> None:
        ready.wait()
        for first in range(0, len(own), batch):
            broker.publish(own[first : first + batch])

    threads = [threading.Thread(target=publish, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    published = time.perf_counter() - began
    came = 0
    while got := consumer.receive(256):
        came += len(got)
        consumer.acknowledge(got)
    return published, time.perf_counter() - began, came


def pace(broker: Broker, rate: int, seconds: float, publishers: int) -> np.ndarray:
    """Publish at a rate; the latency of each message in seconds."""
    consumer = broker.consumer("paced", [Topic.METRICS])
    began = time.perf_counter() + 0.1
    total = int(rate * seconds)

    def publish(number: int) -> None:
        mine, done = range(number, total, publishers), 0
        while done < len(mine):
            due = int((time.perf_counter() - began) * rate / publishers) - done
            if due < 1:
                time.sleep(1e-3)
                continue
            own = mine[done : done + due]
            at = time.perf_counter()
            broker.publish(
                [
                    OonaMessage(
                        topic=Topic.METRICS, key=str(i % 64), sender_id="b", payload={"at": at}
                    )
                    for i in own
                ]
            )
            done += len(own)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(publishers)]
    for thread in threads:
        thread.start()
    taken: list[float] = []
    while len(taken) < total:
        got = consumer.receive(256, 1.0)
        now = time.perf_counter()
        taken += [now - float(str(each.message.payload["at"])) for each in got]
        consumer.acknowledge(got)
    for thread in threads:
        thread.join()
    return np.array(taken)


def measure_bus(results: Results, settings: Settings, name: str, make: Open, least: float) -> None:
    """One bus at each number of publishers, one message at a time and in batches."""
    for publishers in settings.publishers:
        for batch, kind in ((1, "single"), (settings.batch, f"batches of {settings.batch}")):
            own = f"{name}, {publishers} publishers, {kind}"
            if not results.wants(own):
                continue
            count = settings.messages if batch > 1 else settings.messages // 4
            with make() as broker:
                published, all_, came = carry(
                    broker, make_messages(count, settings.keys), publishers, batch
                )
            results.checks.append(Check(f"{own}: came", str(count), str(came)))
            target = least if batch > 1 or least > settings.least_durable else 0.0
            # A figure's target is the most that it may be: time, and not speed.
            limit = 1e6 / target if target else None
            results.figures += [
                Figure(f"{own}: published", count / published, "messages/s"),
                Figure(f"{own}: published and read", count / all_, "messages/s"),
                Figure(f"{own}: published", published / count * 1e6, "µs a message", limit),
            ]
        own = f"{name}, {publishers} publishers, paced at {settings.rate:,}/s"
        if results.wants(own):
            with make() as broker:
                taken = pace(broker, settings.rate, settings.seconds, publishers) * 1e3
            middle, high = (float(q) for q in np.quantile(taken, (0.5, 0.99)))
            results.figures += [
                Figure(f"{own}: p50", middle, "ms"),
                Figure(f"{own}: p99", high, "ms", settings.most_milliseconds),
            ]


def measure_telemetry(results: Results, settings: Settings) -> None:
    """What a training loop waits for when it tells something."""
    name = "TelemetryBus.publish"
    if not results.wants(name):
        return
    payload = {"step": 1, "train_loss": 0.5}
    # Room for all, and a thread that stands still: what that one costs is seen in training.
    quiet: dict[str, Any] = {"sender_id": "bench", "capacity": 1 << 22, "max_seconds": 3600.0}
    with MemoryBroker() as broker, TelemetryBus(broker, **quiet) as bus:

        def build() -> Mapping[str, Call]:
            plain, again = InProcessBus(), InProcessBus()
            return {
                "InProcessBus": lambda: plain.publish(Topic.METRICS, payload),
                "again": lambda: again.publish(Topic.METRICS, payload),
                "TelemetryBus": lambda: bus.publish(Topic.METRICS, payload),
            }

        (row,) = contest(name, {"TelemetryBus": None}, build, settings.sampling)
    results.rows.append(row)
    results.figures.append(
        Figure(name, row.candidate.microseconds, "µs", settings.publish_microseconds)
    )


def measure_training(results: Results, settings: Settings, backend: str, folder: Path) -> None:
    """A run that tells a file of all it does, by turns with one that tells nobody."""
    name = f"training on {backend}, telemetry on"
    if not results.wants(name):
        return
    from experiments.bench._telemetry_runs import compare_runs

    with SqliteBroker(folder / f"{backend}.sqlite") as broker:
        row, told = compare_runs(name, settings, backend, broker, folder)
    results.rows.append(row)
    results.checks.append(Check(f"{name}: dropped", "0", str(sum(told.dropped.values()))))
    results.notes.append(f"{name}: {told.published} messages.")


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """A server that writes to the disk each second, on this core; None where there is none."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    socket = folder / "redis.sock"
    command = [
        program, "--port", "0", "--unixsocket", str(socket), "--dir", str(folder),
        "--appendonly", "yes", "--appendfsync", "everysec", "--save", "",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while not socket.exists() and process.poll() is None:
                time.sleep(0.05)
            yield f"unix://{socket}"
        finally:
            process.terminate()


def measure(settings: Settings, only: str = "") -> Results:
    """All buses, and what telemetry costs."""
    results = Results(only=only)
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        url = stack.enter_context(redis_server(folder))
        numbers = iter(range(10_000))

        def file(synchronous: Any) -> Open:
            return lambda: SqliteBroker(
                folder / f"bus-{next(numbers)}.sqlite", synchronous=synchronous
            )

        measure_bus(results, settings, "memory", MemoryBroker, settings.least_memory)
        for synchronous in ("normal", "full"):
            name = f"SQLite ({synchronous})"
            measure_bus(results, settings, name, file(synchronous), settings.least_durable)
        if url is None:
            results.notes.append("No redis-server is installed: its figures are left out.")
        else:
            from esper.oona import RedisBroker

            measure_bus(
                results, settings, "Redis",
                lambda: RedisBroker(url, name=f"bus-{next(numbers)}"), settings.least_durable,
            )  # fmt: skip
        measure_telemetry(results, settings)
        for backend in ("jax", "torch"):
            measure_training(results, settings, backend, folder)
    return results


BENCHMARK = Benchmark(
    name="bus",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="Telemetry: median of paired ratios (interquartile range)",
    names=("without", "with"),
    packages=("esper-morphogenetic", "numpy", "pydantic", "redis", "hiredis", "jax", "torch"),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

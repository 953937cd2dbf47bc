"""Whether Tamiyo keeps up: `python -m experiments.bench.tamiyo_service`.

Another process tells a bus of 100 models: 10,000 health signals a second, in batches of one model's
seeds, and a report of each model a second. A known number of the signals tell of errors or are
ready for a transition, and so must pass. The service collects every 50 ms and decides every 100
ms by rules, as `esper tamiyo serve` does; at the end it is counted how much of what must pass has
reached the advisor. A bus in memory is fed through a pipe by a thread of the service's process,
whose work counts in the CPU's share.

Then models report to a Tamiyo that a policy of the usual size advises, all between two decisions,
and each decision is timed: from what was reported to what is to be done, one forward pass for all.

The process is not pinned: service, models and a Redis server share the machine as they do in use.
"""

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import jax
import numpy as np

from esper.execution import count_compilations
from esper.oona import Broker, MemoryBroker, SqliteBroker
from esper.tamiyo import Decision
from esper.tamiyo.policy import SUMMARY, Familiar, LoadedPolicy, make_effects, make_policy
from esper.tamiyo.service import (
    HealthCollector,
    News,
    PolicyAdvisor,
    RuleAdvisor,
    Tamiyo,
    TamiyoService,
    frozen_heap,
)
from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Sampling
from experiments.bench._results import Check, Figure, Results
from experiments.bench._tamiyo_models import Sent, make_batch, make_report, read_pipe
from experiments.bench.bus import redis_server

_MOST_BEHIND = 60.0
"""Seconds that the service may take, after the last was published, until all has come."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and what it may take."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    rate: int = 10_000
    """Health signals a second."""
    models: int = 100
    collect_milliseconds: float = 50.0
    decide_milliseconds: float = 100.0
    longest: float = 60.0
    """Seconds that it goes on, where nothing shorter is asked for."""
    reporting: tuple[int, ...] = (1, 16, 64)
    """Models that report between two decisions, where a policy advises."""
    decisions: int = 20
    """Of each of these numbers."""
    width: int = 32
    """Of the policy."""

    @property
    def seconds(self) -> float:
        """How long it goes on."""
        whole = self.sampling.rounds >= Sampling().rounds
        return self.longest if whole else min(3.0, self.longest)


class Watched:
    """An advisor, and what has reached it."""

    def __init__(self) -> None:
        self._advisor = RuleAdvisor()
        self.faulty = self.ready = self.signals = self.most = 0

    def advise(self, news: Sequence[News]) -> list[list[Decision]]:
        """See `Advisor.advise`."""
        for own in news:
            self.faulty += int(own.health["faulty"].sum())
            self.ready += int(own.health["readies"].sum())
            self.signals += int(own.health["signals"].sum())
        self.most = max(self.most, len(news))
        return self._advisor.advise(news)


def measure_service(
    results: Results, settings: Settings, name: str, broker: Broker, place: str
) -> None:
    """The service on one bus.

    Args:
        place: of the bus, for the process of the models; `pipe` for one in memory.
    """
    advisor = Watched()
    service = TamiyoService(
        Tamiyo(advisor),
        broker,
        collect_seconds=settings.collect_milliseconds / 1e3,
        decide_seconds=settings.decide_milliseconds / 1e3,
    )
    # The group begins with what is published from now on.
    service.collect()
    sent: dict[str, float] = {}
    began, busy = time.perf_counter(), time.process_time()
    with _models(settings, place, broker) as models:

        def wait() -> None:
            sent.update(json.loads(models.stderr.read()) if models.stderr else {})
            models.wait()
            ended = time.perf_counter()
            while time.perf_counter() - ended < _MOST_BEHIND and not _all_came(service, sent):
                time.sleep(0.01)
            sent["behind"] = time.perf_counter() - ended
            service.stop()

        waiting = threading.Thread(target=wait)
        waiting.start()
        with frozen_heap():
            service.run()
        waiting.join()
    share = (time.process_time() - busy) / (time.perf_counter() - began)
    outcomes, counts = service.tamiyo.collector.outcomes, service.tamiyo.counts
    lost = int(sent["faulty"] + sent["ready"]) - advisor.faulty - advisor.ready
    results.checks += [
        Check(f"{name}: signals that came", str(sent["signals"]), str(outcomes.received)),
        Check(f"{name}: reports that came", str(sent["reports"]), str(counts.reports)),
        Check(f"{name}: lost of what must pass", "0", str(lost)),
    ]
    deciding, collecting = service.deciding, service.collecting
    results.figures += [
        Figure(f"{name}: signals sent", sent["signals"] / sent["seconds"], "signals/s"),
        Figure(f"{name}: of those, must pass", float(sent["faulty"] + sent["ready"]), "signals"),
        *(
            Figure(f"{name}: decision {told}", 1e3 * value, "ms", settings.decide_milliseconds)
            for told, value in (
                ("p50", deciding.quantile(0.5)), ("p95", deciding.quantile(0.95)),
                ("max", deciding.slowest),
            )
        ),
        Figure(
            f"{name}: collection p95", 1e3 * collecting.quantile(0.95), "ms",
            settings.collect_milliseconds,
        ),
        Figure(f"{name}: collection max", 1e3 * collecting.slowest, "ms"),
        Figure(f"{name}: until the last had come", sent["behind"], "s"),
        Figure(f"{name}: turns left out", float(deciding.late + collecting.late), "turns"),
        Figure(f"{name}: models in one decision, at most", float(advisor.most), "models"),
        Figure(
            f"{name}: decisions published", float(service.traffic.published), "decisions"
        ),
        Figure(f"{name}: CPU", share, "cores"),
    ]  # fmt: skip


def _all_came(service: TamiyoService, sent: Mapping[str, float]) -> bool:
    counts = service.tamiyo.collector.outcomes.received, service.tamiyo.counts.reports
    return counts == (sent["signals"], sent["reports"])


@contextlib.contextmanager
def _models(settings: Settings, place: str, broker: Broker) -> Iterator["subprocess.Popen[bytes]"]:
    """The process of the models; what it pipes here is put on the bus."""
    command = [
        sys.executable, "-m", "experiments.bench._tamiyo_models", place, str(settings.seconds),
        str(settings.rate), str(settings.models),
    ]  # fmt: skip
    piped = place == "pipe"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE if piped else None, stderr=subprocess.PIPE
    ) as process:
        try:
            if piped and process.stdout is not None:
                threading.Thread(target=_put, args=(process.stdout, broker), daemon=True).start()
            yield process
        finally:
            process.terminate()


def _put(source: IO[bytes], broker: Broker) -> None:
    while (message := read_pipe(source)) is not None:
        broker.publish([message])


def make_advisor(width: int) -> PolicyAdvisor:
    """One by a policy that has learned nothing, for which no network is unfamiliar."""
    keys = jax.random.split(jax.random.key(0))
    zeros = np.zeros(len(SUMMARY), np.float32)
    return PolicyAdvisor(
        LoadedPolicy(
            policy=make_policy(keys[0], width=width),
            effects=make_effects(keys[1], width),
            familiar=Familiar(zeros, zeros + 1.0, np.float32(1e9)),
            max_epistemic=math.inf,
            min_confidence=0.0,
            card={},
        )
    )


def measure_policy(results: Results, settings: Settings) -> None:
    """Decisions that a policy advises upon."""
    for count in settings.reporting:
        name = f"policy, {count} models"
        if not results.wants(name):
            continue
        tamiyo = Tamiyo(make_advisor(settings.width), collector=HealthCollector(sample=1.0))
        random, taken = np.random.default_rng(0), list[float]()
        asked = before = 0
        with count_compilations() as compiled:
            for step in range(1, settings.decisions + 2):
                for model in range(count):
                    tamiyo.report(f"run-{model}", make_report(step))
                    health = make_batch(random, step, Sent())
                    tamiyo.collect(f"run-{model}", health)
                began = time.perf_counter()
                asked += sum(len(own.decisions) for own in tamiyo.decide(float(step)))
                taken.append(1e3 * (time.perf_counter() - began))
                before = compiled() if step == 1 else before
            later = compiled() - before
        results.checks.append(Check(f"{name}: compiled after the first decision", "0", str(later)))
        results.figures += [
            Figure(f"{name}: first decision, which compiles", taken[0], "ms"),
            Figure(f"{name}: decision p50", float(np.median(taken[1:])), "ms"),
            Figure(
                f"{name}: decision max", max(taken[1:]), "ms", settings.decide_milliseconds
            ),
            Figure(f"{name}: decisions asked for", float(asked), "decisions"),
        ]  # fmt: skip


def measure(settings: Settings, only: str = "") -> Results:
    """The service on each bus, and a policy's advice."""
    results = Results(only=only)
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        buses: dict[str, tuple[Callable[[], Broker], str]] = {
            "memory": (MemoryBroker, "pipe"),
            "SQLite": (
                lambda: SqliteBroker(folder / "bus.sqlite"), f"sqlite:{folder / 'bus.sqlite'}"
            ),
        }  # fmt: skip
        url = stack.enter_context(redis_server(folder))
        if url is None:
            results.notes.append("No redis-server is installed: its figures are left out.")
        else:
            from esper.oona import RedisBroker

            buses["Redis"] = (lambda: RedisBroker(url), url)
        for name, (open_bus, where) in buses.items():
            if results.wants(name):
                with open_bus() as broker:
                    measure_service(results, settings, name, broker, where)
    measure_policy(results, settings)
    return results


BENCHMARK = Benchmark(
    name="tamiyo_service",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    packages=("esper-morphogenetic", "numpy", "pydantic", "redis", "hiredis", "jax"),
    pinned=False,
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

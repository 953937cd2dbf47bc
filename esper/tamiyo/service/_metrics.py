"""What the service tells Prometheus of itself, and what it says when it is asked how it is."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from esper.tamiyo.service._counts import LearningCounts
from esper.tamiyo.service._loop import TamiyoService

_QUANTILES = (0.5, 0.95, 1.0)


class ServiceCollector:
    """Reads a service's counts when it is asked; they are written by another thread."""

    def __init__(self, service: TamiyoService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """One family for each quantity."""
        service = self._service
        tamiyo, counts = service.tamiyo, service.tamiyo.counts
        outcomes = dataclasses.asdict(tamiyo.collector.outcomes)
        yield _counts("signals", "Health signals, by what became of them.", "outcome", outcomes)
        traffic = dataclasses.asdict(service.traffic)
        yield _counts("messages", "Messages, by what became of them.", "outcome", traffic)
        decided = "Decisions that were allowed."
        yield _counts("decisions", decided, "action", dict(counts.decisions))
        yield _counts("vetoes", "Decisions that were refused.", "rule", dict(counts.vetoes))
        others = {
            name: value
            for name, value in dataclasses.asdict(counts).items()
            if isinstance(value, int)
        }
        yield _counts("events", "What else there was.", "kind", others)
        failures = "Calls that raised."
        yield _counts("failures", failures, "who", dict(counts.failures))
        if tamiyo.learner is not None:
            yield from _learning(tamiyo.learner.counts)
        seconds = GaugeMetricFamily(
            "esper_tamiyo_tick_seconds", "Durations of the last turns.", labels=["tick", "quantile"]
        )
        late = CounterMetricFamily(
            "esper_tamiyo_ticks_late", "Turns that were left out.", labels=["tick"]
        )
        ticks = CounterMetricFamily("esper_tamiyo_ticks", "Turns.", labels=["tick"])
        for name, own in (("collect", service.collecting), ("decide", service.deciding)):
            for q in _QUANTILES:
                seconds.add_metric([name, f"{q:g}"], own.quantile(q))
            late.add_metric([name], own.late)
            ticks.add_metric([name], own.count)
        yield from (seconds, late, ticks)
        for name, told, value in (
            ("models", "Models that are looked after.", tamiyo.models),
            ("held", "Rows of health that wait.", len(tamiyo.collector)),
            ("healthy", "Whether the bus answers and decisions are made.", service.healthy),
            ("shadow", "Whether nobody is to act on its decisions.", tamiyo.shadow),
            ("learning", "Whether it learns.", tamiyo.learning),
        ):
            yield GaugeMetricFamily(f"esper_tamiyo_{name}", told, value=float(value))
        busy = CounterMetricFamily(
            "esper_tamiyo_cpu_seconds", "Of the process.", value=time.process_time()
        )
        yield busy

    def describe(self) -> tuple[()]:
        """Nothing, so that registering does not collect."""
        return ()


def _learning(counts: LearningCounts) -> Iterator[Metric]:
    """What the learner has done."""
    made = {"made": counts.updates, "skipped": counts.skipped, "held_back": counts.held_back,
            "put_off": counts.put_off}  # fmt: skip
    yield _counts("updates", "Updates of the policy, by what became of them.", "outcome", made)
    outcomes = {"taken": counts.taken} | dict(counts.refused)
    told = "Experiences, by what became of them: taken, or why they teach nothing."
    yield _counts("experiences", told, "outcome", outcomes)
    for name, what, value in (
        ("reward", "Mean reward of the experiences taken.", counts.reward),
        ("loss", "Loss of the last update.", counts.loss),
        ("kl", "Divergence from the policy that it began with, in nats.", counts.kl),
    ):
        yield GaugeMetricFamily(f"esper_tamiyo_learning_{name}", what, value=value)


def _counts(name: str, told: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"esper_tamiyo_{name}", told, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def metrics_text(service: TamiyoService) -> bytes:
    """All of it in Prometheus's format."""
    registry, collector = CollectorRegistry(auto_describe=False), ServiceCollector(service)
    found: Any = collector
    registry.register(found)
    return generate_latest(registry)


def health_of(service: TamiyoService) -> dict[str, Any]:
    """How the service is, as JSON values."""
    tamiyo = service.tamiyo
    return {
        "status": "ok" if service.healthy else "failed",
        "bus": service.last_error or "ok",
        "shadow": tamiyo.shadow,
        "learning": tamiyo.learning,
        "models": tamiyo.models,
        "held": len(tamiyo.collector),
        "decisions": sum(tamiyo.counts.decisions.values()),
        "vetoes": sum(tamiyo.counts.vetoes.values()),
        "seconds": round(service.seconds, 3),
    }

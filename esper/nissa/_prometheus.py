"""Measurements of runs as Prometheus collects them: from a file, or from the live page's server."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from esper.errors import InputError
from esper.nissa._history import number
from esper.nissa._run_files import State
from esper.oona import Bus, Topic

_GAUGES = {
    "step": "Step of the newest measurement.",
    "train_loss": "Mean training loss since the measurement before.",
    "validation_loss": "Loss on the validation part.",
    "validation_accuracy": "Accuracy on the validation part, in [0, 1].",
    "test_loss": "Loss on the test part, which decides nothing.",
    "test_accuracy": "Accuracy on the test part, in [0, 1].",
    "parameters": "Parameters of the network, kernels included.",
    "learning_rate": "Learning rate.",
}
_COUNTERS = {
    "flops": "Floating-point operations of training so far.",
    "compilations": "Programs compiled.",
    "rollbacks": "How often the run was taken back.",
}
_SEEDS = {
    "stages": ("esper_seed_stage", "Stage: 0 dormant, 1 loading, 2 active, 3 failed, 4 fossil."),
    "alphas": ("esper_seed_alpha", "Weight of the seed's kernel, in [0, 1]."),
    "health": ("esper_seed_health", "Health of the seed's kernel, in [0, 1]."),
}


class RunCollector:
    """The newest measurements of runs, labelled by `run`, and for seeds by `layer` and `seed`.

    Attributes may be changed between collections.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Mapping[str, Any]] = {}
        """By run."""
        self.states: dict[str, State] = {}
        self.events: dict[str, Counter[str]] = {}
        """Entries by kind."""
        self.lost: dict[str, int] = {}
        """Messages that did not arrive."""

    def collect(self) -> Iterator[Metric]:
        """One family for each quantity; what was not measured has no sample."""
        for key, told in _GAUGES.items():
            yield self._scalars(GaugeMetricFamily(f"esper_{key}", told, labels=["run"]), key)
        for key, told in _COUNTERS.items():
            yield self._scalars(CounterMetricFamily(f"esper_{key}", told, labels=["run"]), key)
        spent = CounterMetricFamily(
            "esper_spent_seconds", "Wall time by activity.", labels=["run", "activity"]
        )
        for run, row in self.rows.items():
            for activity, seconds in dict(row.get("seconds") or {}).items():
                _add(spent, [run, str(activity)], seconds)
        yield spent
        for key, (name, told) in _SEEDS.items():
            family = GaugeMetricFamily(name, told, labels=["run", "layer", "seed"])
            for run, row in self.rows.items():
                for layer, seeds in enumerate(row.get(key) or ()):
                    for seed, value in enumerate(seeds):
                        _add(family, [run, str(layer), str(seed)], value)
            yield family
        state = GaugeMetricFamily(
            "esper_run_state", "1 for how it stands.", labels=["run", "state"]
        )
        for run, found in self.states.items():
            _add(state, [run, found.value], 1.0)
        yield state
        events = CounterMetricFamily("esper_events", "Ledger entries.", labels=["run", "kind"])
        for run, kinds in self.events.items():
            for kind, count in sorted(kinds.items()):
                _add(events, [run, kind], count)
        yield events
        lost = CounterMetricFamily("esper_messages_lost", "Never written.", labels=["run"])
        for run, count in self.lost.items():
            _add(lost, [run], count)
        yield lost

    def describe(self) -> tuple[()]:
        """Nothing, so that registering does not collect."""
        return ()

    def _scalars(self, family: Metric, key: str) -> Metric:
        for run, row in self.rows.items():
            _add(family, [run], row.get(key))
        return family


def _add(family: Any, labels: list[str], value: object) -> None:
    found = number(value)
    if found is not None:
        # The name of a folder may hold bytes that are no text.
        family.add_metric(
            [label.encode("utf-8", "backslashreplace").decode() for label in labels], found
        )


def registry_of(
    rows: Mapping[str, Mapping[str, Any]], states: Mapping[str, State]
) -> CollectorRegistry:
    """A registry of these runs and nothing else."""
    collector, registry = RunCollector(), CollectorRegistry(auto_describe=False)
    collector.rows, collector.states = dict(rows), dict(states)
    _register(registry, collector)
    return registry


def _register(registry: CollectorRegistry, collector: RunCollector) -> None:
    found: Any = collector
    registry.register(found)


class PrometheusWriter:
    """Keeps a file for the textfile collector of Prometheus' node exporter up to date.

    The file is replaced whole at each flush. A flush never raises: what could not be written is
    counted in `lost`, and told on closing.

    Args:
        path: the file, which must end in `.prom` for the exporter to see it.
        run: the label of the run.

    Raises:
        InputError: for a file of another ending, or in no folder.
    """

    def __init__(self, path: Path, bus: Bus, run: str) -> None:
        if path.suffix != ".prom":
            raise InputError(
                f"the Prometheus file {path} must end in .prom: the textfile collector reads no"
                " other"
            )
        if not path.parent.is_dir():
            raise InputError(
                f"the Prometheus file {path} cannot be written: there is no folder {path.parent};"
                " make it, or give another"
            )
        self.path = path
        self.lost = 0
        """Measurements that the file has never shown."""
        self._messages = bus.subscribe(Topic.METRICS, Topic.SEED_EVENT)
        self._run = run
        self._collector = RunCollector()
        self._collector.events[run] = Counter()
        self._registry = CollectorRegistry(auto_describe=False)
        _register(self._registry, self._collector)
        self._failure = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        if self.lost:
            logging.getLogger("esper").warning(
                "%d measurements were not written for Prometheus to %s: %s",
                self.lost,
                self.path,
                self._failure,
            )

    def flush(self) -> None:
        """Write the newest measurement, where there is a new one."""
        waiting = self._messages.drain()
        measured = 0
        for message in waiting:
            if message.topic is Topic.METRICS:
                self._collector.rows[self._run] = message.payload
                measured += 1
            else:
                self._collector.events[self._run][str(message.payload.get("kind"))] += 1
        if not waiting:
            return
        self._collector.lost[self._run] = self.lost + self._messages.dropped
        try:
            write_to_textfile(str(self.path), self._registry)
        except (OSError, ValueError, TypeError) as error:
            self.lost += measured
            self._failure = self._failure or str(error)

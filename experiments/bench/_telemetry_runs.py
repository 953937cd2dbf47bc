"""A run that tells a bus what it does, by turns with one that tells nobody."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from esper.contracts import Topic
from esper.oona import Broker, Bus, InProcessBus, Subscription, TelemetryBus, TelemetryStatistics
from experiments.bench._paired import Sampling
from experiments.bench._results import Row, Timing
from experiments.bench._training_loops import configure, make_data, mlp

OFF, AGAIN, ON = range(3)
_ORDERS = ((OFF, ON, AGAIN), (AGAIN, OFF, ON), (ON, AGAIN, OFF))


class Switch:
    """A `Bus` that tells others or does not."""

    def __init__(self, told: TelemetryBus, local: InProcessBus) -> None:
        self._told = told
        self._local = local
        self._to: Bus = local

    def set(self, on: bool) -> None:
        """Tell others from now on, or nobody."""
        self._to = self._told if on else self._local

    def publish(self, topic: Topic, payload: Mapping[str, Any]) -> None:
        """See `Bus.publish`."""
        self._to.publish(topic, payload)

    def subscribe(self, *topics: Topic, capacity: int = 65_536) -> Subscription:
        """See `Bus.subscribe`."""
        return self._local.subscribe(*topics, capacity=capacity)


class Windows:
    """Times stretches of one run, each in one of three states.

    By the time that the process had the core, in all its threads: what the thread of the telemetry
    does counts, and is waited for.
    """

    def __init__(self, switch: Switch, told: TelemetryBus, steps: int, sampling: Sampling) -> None:
        self._switch = switch
        self._told = told
        self._steps = steps
        self._sampling = sampling
        self._taken = [0.0, 0.0, 0.0]
        self._window = -3
        self._began = 0.0
        self.rounds: list[list[float]] = []
        self._start = time.monotonic()

    def over(self) -> bool:
        """Whether all rounds were taken, or those that there is time for."""
        spent = time.monotonic() - self._start > self._sampling.budget
        count = len(self.rounds)
        return count >= self._sampling.rounds or (spent and count >= self._sampling.least)

    @property
    def _state(self) -> int:
        return _ORDERS[self._window // 3 % 3][self._window % 3]

    def turn(self, row: Mapping[str, Any]) -> None:
        """At each boundary."""
        if row["step"] % self._steps:
            return
        while self._told.statistics.waiting:
            time.sleep(1e-3)
        if row["step"] > self._steps:
            self._taken[self._state] = time.process_time() - self._began
            self._window += 1
            if self._window > 0 and self._window % 3 == 0:
                self.rounds.append(list(self._taken))
        self._switch.set(self._state == ON)
        self._began = time.process_time()


def compare_runs(
    name: str, settings: Any, backend: str, broker: Broker, folder: Path
) -> tuple[Row, TelemetryStatistics]:
    """The same run with telemetry off, off again, and on."""
    from esper.errors import Interrupted
    from esper.tolaria import Hooks, start_run

    work = mlp((128, 512, 256, 6), 64)
    task = make_data(work, 2_048, 0)
    local = InProcessBus()
    steps = settings.steps * 3 * (settings.sampling.rounds + 4)
    config = configure(
        backend, work, folder / "library",
        steps=steps, controller="random", graft_probability=0.0, decide_every=50,
        checkpoint_every=steps,
    )  # fmt: skip
    with TelemetryBus(broker, sender_id=name, local=local) as told:
        switch = Switch(told, local)
        windows = Windows(switch, told, settings.steps, settings.sampling)
        hooks = Hooks(stop=windows.over, on_boundary=windows.turn)
        with suppress(Interrupted):
            start_run(folder / f"run-{backend}", config, task=task, bus=switch, hooks=hooks)
    seconds = np.array(windows.rounds)
    off, again, on = (_timing(own, seconds[:, OFF], settings.steps) for own in seconds.T)
    row = Row(name, settings.training_ratio, settings.steps, off, again, on, rounds=len(seconds))
    return row, told.statistics


def _timing(seconds: np.ndarray, reference: np.ndarray, steps: int) -> Timing:
    low, middle, high = (float(q) for q in np.quantile(seconds / reference, (0.25, 0.5, 0.75)))
    return Timing(float(np.median(seconds)) / steps * 1e6, middle, (low, high))

"""What a network costs: counted, and, for reports alone, timed."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esper.artifacts import Artifact
from esper.errors import InputError
from esper.tolaria._trainee import Trainee

Clock = Callable[[], int]
"""Nanoseconds since some moment; never goes back."""


class Latency(NamedTuple):
    """How long a call takes, in µs. Another run gives other numbers: report it, decide nothing."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    repeats: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a network as it is."""

    parameters: int
    flops: float
    """Of a forward pass of one example."""
    memory: int
    """Bytes of parameters, moments and averages, as a checkpoint would hold them."""
    latency: Latency | None
    """Of a forward pass; None where it was not measured."""


def costs(
    trainee: Trainee,
    x: np.ndarray | None = None,
    *,
    kernels: Sequence[Artifact] = (),
    repeats: int = 30,
    clock: Clock = time.perf_counter_ns,
) -> Costs:
    """What host and kernels cost.

    Args:
        x: examples of which the forward pass is timed; None times nothing.
        kernels: others that are to come; they add to parameters and FLOPs, not to what is measured.
        repeats: of the timing.

    Raises:
        InputError: for fewer than one repeat.
    """
    counted = trainee.cost(kernels)
    timed = None
    if x is not None:
        timed = latencies({"": lambda: trainee.predict(x)}, repeats=repeats, clock=clock)[""]
    return Costs(counted.parameters, counted.flops, memory_bytes(trainee.snapshot()), timed)


def latencies(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 30,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Latency]:
    """How long each call takes, all of them in turns.

    Each is called once first, which compiles what it must. They are then called in turns, in the
    opposite order every other time, so that a machine that is busy for a while is so for all.

    Args:
        calls: by name; each must wait for its own result.
        repeats: at least 1.

    Raises:
        InputError: for fewer than one repeat.
    """
    if type(repeats) is not int or repeats < 1:
        raise InputError(f"`repeats` must be an integer from 1 on, got {repeats!r}")
    taken: dict[str, list[int]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(repeats):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            started = clock()
            calls[name]()
            taken[name].append(clock() - started)
    return {name: _latency(np.array(times) / 1000.0) for name, times in taken.items()}


def _latency(microseconds: np.ndarray) -> Latency:
    low, median, high = np.quantile(microseconds, [0.25, 0.5, 0.75])
    return Latency(float(median), float(low), float(high), len(microseconds))


def memory_bytes(snapshot: Mapping[str, Any]) -> int:
    """Bytes of all arrays in a snapshot but the seeds' own state."""
    return sum(_bytes(part) for name, part in snapshot.items() if name != "seeds")


def _bytes(tree: Any) -> int:
    if isinstance(tree, Mapping):
        return sum(_bytes(part) for part in tree.values())
    return int(np.asarray(tree).nbytes)

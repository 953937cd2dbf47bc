"""Paired timing of variants that do the same work, on one core and one thread.

Every variant runs in every round, one after the other; the order rotates from
round to round and turns round every cycle, so that none is always the first or
always behind the same neighbour. What is reported is a ratio: the median over
rounds of a variant's time divided by the reference's in the same round. A
machine that slows down for a while slows both.

The reference is measured against a second twin of itself as well. How far that
ratio is from 1 is what the measurement cannot tell apart. Where things happen to
lie in memory shifts a ratio by up to a hundredth for as long as they lie there,
so the variants are built anew several times and all builds' rounds are pooled.
"""

import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.bench._results import Row, Timing

Call = Callable[[], object]
"""One piece of work, ready to run."""

Clock = Literal["wall", "cpu"]
"""`wall` is what is felt; `cpu` leaves out the time in which others had the core."""

_XLA_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


class Twins(NamedTuple):
    """Three calls that do the same work, each on objects and programs of its own."""

    reference: Call
    again: Call
    """A second reference, built the same way."""
    candidate: Call


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How long is measured."""

    rounds: int = 450
    """How often every variant is timed, rounded up to a multiple of `builds`."""
    builds: int = 3
    """How often the variants are built; the rounds are shared out among the builds."""
    sample: float = 2e-3
    """Least seconds of one timing; calls are repeated until it is reached."""
    warmup: int = 10
    """Rounds of each build that are not counted."""
    budget: float = 30.0
    """Seconds of timing after which the rounds of one comparison are cut, but not below `least`."""
    least: int = 24
    clock: Clock = "wall"


class Comparison(NamedTuple):
    """Several variants, timed against the first of them."""

    rounds: int
    """How often each was timed."""
    repeats: int
    """Calls in one timing."""
    timings: dict[str, Timing]
    """By variant."""


def one_core() -> int | None:
    """Pin the process to one core and XLA to one thread; the core, or None where it cannot.

    To be called before jax compiles anything: XLA reads its flags then. The last
    core is taken, the first being where most machines serve interrupts. torch is
    told by `torch.set_num_threads(1)`.
    """
    one_thread()
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def one_thread() -> None:
    """Give XLA's operations one thread each; to be called before jax compiles anything."""
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} {_XLA_ONE_THREAD}".strip()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def compare_all(
    build: Callable[[], Mapping[str, Call]],
    sampling: Sampling,
    wait: Callable[[Any], object] = lambda result: result,
) -> Comparison:
    """Time variants that do the same work; the first is the reference.

    Args:
        build: makes the calls; what they run once is compiled before it is timed.
        wait: blocks until a result is there, for frameworks that run ahead.
    """
    clock = time.perf_counter if sampling.clock == "wall" else time.process_time
    rounds = repeats = 0
    names: list[str] = []
    parts: list[np.ndarray[Any, Any]] = []
    for _ in range(sampling.builds):
        variants = build()
        names, calls = list(variants), list(variants.values())
        for call in calls:
            wait(call())
        if not repeats:
            repeats, seconds = _repeats(calls, sampling.sample, wait, clock)
            affordable = int(sampling.budget / (seconds * len(calls)))
            rounds = min(sampling.rounds, max(sampling.least, affordable))
        own = math.ceil(rounds / sampling.builds)
        parts.append(_rounds(calls, repeats, own, min(sampling.warmup, own), wait, clock))
    seconds = np.concatenate(parts)
    timings = {name: _timing(seconds[:, i], seconds[:, 0], repeats) for i, name in enumerate(names)}
    return Comparison(len(seconds), repeats, timings)


def compare(
    name: str,
    target: float,
    build: Callable[[], Twins],
    sampling: Sampling,
    wait: Callable[[Any], object] = lambda result: result,
) -> Row:
    """Time a candidate against a reference that does the same work; see `compare_all`."""
    (row,) = contest(
        name, {"candidate": target}, lambda: build()._asdict(), sampling, wait, named=False
    )
    return row


def contest(
    name: str,
    targets: Mapping[str, float | None],
    build: Callable[[], Mapping[str, Call]],
    sampling: Sampling,
    wait: Callable[[Any], object] = lambda result: result,
    named: bool = True,
) -> list[Row]:
    """Time several candidates against one reference: a row for each.

    Args:
        targets: the greatest ratio that each candidate is to have; None for no target.
        build: makes a reference, its second twin, and the candidates by name, in this order.
        named: whether rows carry their candidate's name.
    """
    found = compare_all(build, sampling, wait)
    reference, again = list(found.timings.values())[:2]
    return [
        Row(
            name,
            target,
            found.repeats,
            reference,
            again,
            found.timings[variant],
            variant=variant if named else "",
            rounds=found.rounds,
        )
        for variant, target in targets.items()
    ]


def starting_with(
    first: Mapping[str, Call], build: Callable[[], Mapping[str, Call]]
) -> Callable[[], Mapping[str, Call]]:
    """`build`, which gives variants that were built already the first time."""
    built = [first]
    return lambda: built.pop() if built else build()


def _rounds(
    calls: Sequence[Call],
    repeats: int,
    rounds: int,
    warmup: int,
    wait: Callable[[Any], object],
    clock: Callable[[], float],
) -> np.ndarray[Any, Any]:
    """Seconds of each timing, `[rounds, variants]`, of one build."""
    seconds = np.empty((rounds, len(calls)))
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            order = [(turn + i) % len(calls) for i in range(len(calls))]
            if turn // len(calls) % 2:
                order.reverse()
            for i in order:
                taken = _sample(calls[i], repeats, wait, clock)
                if turn >= 0:
                    seconds[turn, i] = taken
    finally:
        gc.enable()
    return seconds


def _sample(
    call: Call, repeats: int, wait: Callable[[Any], object], clock: Callable[[], float]
) -> float:
    result = None
    start = clock()
    for _ in range(repeats):
        result = call()
    wait(result)
    return clock() - start


def _repeats(
    calls: Sequence[Call],
    sample: float,
    wait: Callable[[Any], object],
    clock: Callable[[], float],
) -> tuple[int, float]:
    """Calls that take the fastest variant at least `sample` seconds, even at its best.

    Returns:
        The number of calls, and about how many seconds they take a variant.
    """
    repeats = 1
    while True:
        taken = [_sample(call, repeats, wait, clock) for call in calls]
        if min(taken) < 10 * sample:  # far above it, one look is enough
            taken += [_sample(call, repeats, wait, clock) for call in calls for _ in range(4)]
        best = min(taken)
        if best >= sample:
            return repeats, float(np.mean(taken))
        repeats = max(repeats + 1, math.ceil(min(10.0, 1.1 * sample / max(best, 1e-9)) * repeats))


def _timing(seconds: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], repeats: int) -> Timing:
    ratios = seconds / reference
    low, middle, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return Timing(float(np.median(seconds)) / repeats * 1e6, middle, (low, high))

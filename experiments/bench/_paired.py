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
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

Call = Callable[[], object]
"""One piece of work, ready to run."""

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


@dataclasses.dataclass(frozen=True)
class Timing:
    """One variant's time, alone and against the reference's in the same rounds."""

    microseconds: float
    """Median time of one call."""
    ratio: float
    """Median of the paired ratios."""
    quartiles: tuple[float, float]
    """The ratios' interquartile range."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One piece of work in its variants: the reference, its second twin, the candidate."""

    name: str
    target: float
    """The candidate's ratio is to be at most this."""
    repeats: int
    """Calls in one timing."""
    reference: Timing
    again: Timing
    candidate: Timing

    @property
    def met(self) -> bool:
        """Whether the median ratio is within the target, noise or not."""
        return self.candidate.ratio <= self.target


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that is so or not, without a clock."""

    name: str
    expected: str
    found: str

    @property
    def met(self) -> bool:
        """Whether what was found is what was expected."""
        return self.found == self.expected


def one_core() -> int | None:
    """Pin the process to one core and XLA to one thread; the core, or None where it cannot.

    To be called before jax compiles anything: XLA reads its flags then. The last
    core is taken, the first being where most machines serve interrupts. torch is
    told by `torch.set_num_threads(1)`.
    """
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} {_XLA_ONE_THREAD}".strip()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def compare(
    name: str,
    target: float,
    build: Callable[[], Twins],
    sampling: Sampling,
    wait: Callable[[Any], object] = lambda result: result,
) -> Row:
    """Time a candidate against a reference that does the same work.

    Args:
        build: makes the three calls; what they run once is compiled before it is timed.
        wait: blocks until a result is there, for frameworks that run ahead.
    """
    repeats = 0
    parts: list[np.ndarray[Any, Any]] = []
    for _ in range(sampling.builds):
        calls = build()
        for call in calls:
            wait(call())
        repeats = repeats or _repeats(calls, sampling.sample, wait)
        parts.append(_rounds(calls, repeats, sampling, wait))
    seconds = np.concatenate(parts)
    timings = [_timing(seconds[:, i], seconds[:, 0], repeats) for i in range(len(Twins._fields))]
    return Row(name, target, repeats, *timings)


def _rounds(
    calls: Twins, repeats: int, sampling: Sampling, wait: Callable[[Any], object]
) -> np.ndarray[Any, Any]:
    """Seconds of each timing, `[rounds, variants]`, of one build."""
    rounds = math.ceil(sampling.rounds / sampling.builds)
    seconds = np.empty((rounds, len(calls)))
    gc.collect()
    gc.disable()
    try:
        for turn in range(-sampling.warmup, rounds):
            order = [(turn + i) % len(calls) for i in range(len(calls))]
            if turn // len(calls) % 2:
                order.reverse()
            for i in order:
                taken = _sample(calls[i], repeats, wait)
                if turn >= 0:
                    seconds[turn, i] = taken
    finally:
        gc.enable()
    return seconds


def _sample(call: Call, repeats: int, wait: Callable[[Any], object]) -> float:
    result = None
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    wait(result)
    return time.perf_counter() - start


def _repeats(calls: Sequence[Call], sample: float, wait: Callable[[Any], object]) -> int:
    """Calls that take the fastest variant at least `sample` seconds, even at its best."""
    repeats = 1
    while True:
        best = min(_sample(call, repeats, wait) for call in calls for _ in range(5))
        if best >= sample:
            return repeats
        repeats = max(repeats + 1, math.ceil(min(10.0, 1.1 * sample / best) * repeats))


def _timing(seconds: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], repeats: int) -> Timing:
    ratios = seconds / reference
    low, middle, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return Timing(float(np.median(seconds)) / repeats * 1e6, middle, (low, high))


def machine(core: int | None, packages: Sequence[str]) -> dict[str, Any]:
    """What was measured on; packages that are not installed have version None."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "pinned_to": core,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def console() -> Console:
    """A console wide enough for the tables where the output is not a terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=150)


def _verdict(met: bool) -> str:
    return "[green]met[/]" if met else "[red]not met[/]"


def print_rows(out: Console, title: str, rows: Sequence[Row], names: tuple[str, str]) -> None:
    """One line a row; `names` are the reference's and the candidate's."""
    reference, candidate = names
    table = Table(title=title, title_justify="left")
    table.add_column("work", no_wrap=True)
    for heading in (
        f"{reference} µs", f"{candidate} µs", f"{reference} again / {reference}",
        f"{candidate} / {reference}", "target", "",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.reference.microseconds:.1f}",
            f"{row.candidate.microseconds:.1f}",
            _ratio(row.again),
            _ratio(row.candidate),
            f"≤ {row.target:g}",
            _verdict(row.met),
        )
    out.print(table)


def _ratio(timing: Timing) -> str:
    low, high = timing.quartiles
    return f"{timing.ratio:.4f} [dim]({low:.3f}–{high:.3f})[/]"


def print_checks(out: Console, title: str, checks: Sequence[Check]) -> None:
    """One line a check."""
    table = Table("what", "expected", "found", "", title=title, title_justify="left")
    for check in checks:
        table.add_row(check.name, check.expected, check.found, _verdict(check.met))
    out.print(table)


def write_json(
    path: Path,
    *,
    benchmark: str,
    settings: Any,
    machine: Mapping[str, Any],
    rows: Sequence[Row],
    checks: Sequence[Check],
    notes: Sequence[str] = (),
) -> None:
    """Write what was measured; times in µs, `settings` a dataclass."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": benchmark,
        "settings": dataclasses.asdict(settings),
        "machine": dict(machine),
        "rows": [dataclasses.asdict(row) | {"met": row.met} for row in rows],
        "checks": [dataclasses.asdict(check) | {"met": check.met} for check in checks],
        "notes": list(notes),
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The command line that all benchmarks have in common."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.bench._paired import Clock, Sampling


class Options(NamedTuple):
    """What was asked for."""

    sampling: Sampling
    only: str
    json: Path


def parse(
    benchmark: str,
    description: str | None,
    *,
    quick: int,
    standard: Sampling,
    argv: Sequence[str] | None = None,
) -> Options:
    """Read the command line; on bad usage says what is wrong and exits with status 2.

    Args:
        benchmark: its name.
        quick: rounds of a rough look.
        standard: what is done where nothing else is asked for.
        argv: the arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog=f"experiments.bench.{benchmark}", description=description)
    parser.add_argument("--quick", action="store_true", help=f"{quick} rounds: a rough look")
    parser.add_argument("--rounds", type=int, help="how often every variant is timed")
    parser.add_argument("--only", default="", help="only comparisons whose names contain this text")
    parser.add_argument(
        "--cpu-clock",
        action="store_true",
        help="count the process's own time, for machines that others use too",
    )
    parser.add_argument("--json", type=Path, default=Path(f"runs/bench/{benchmark}.json"))
    options = parser.parse_args(argv)
    rounds: int = quick if options.quick else standard.rounds
    if options.rounds is not None:
        rounds = options.rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    clock: Clock = "cpu" if options.cpu_clock else "wall"
    asked = Sampling(
        rounds=rounds,
        builds=min(standard.builds, rounds),
        sample=standard.sample,
        warmup=standard.warmup,
        budget=standard.budget / 5 if options.quick else standard.budget,
        least=min(standard.least, rounds),
        clock=clock,
    )
    return Options(asked, options.only, options.json)

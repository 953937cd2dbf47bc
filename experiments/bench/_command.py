"""The command line that all benchmarks have in common.

A benchmark is described by a `Benchmark`, and `run` does the rest: it reads the
command line, gives the process its core, measures, prints and writes the file.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from experiments.bench._paired import Clock, Sampling, one_core, one_thread
from experiments.bench._results import Results, console, finish, machine

S = TypeVar("S")

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class Benchmark(Generic[S]):
    """What `run` needs to know of a benchmark; `S` are its settings, a dataclass.

    A benchmark's module describes it and hands it to `run`:

        BENCHMARK = Benchmark(
            name="state",
            doc=__doc__,
            settings=Settings,
            measure=measure,
            title="The state step: median of paired ratios",
            names=("by hand", "ours"),
        )

        if __name__ == "__main__":
            sys.exit(run(BENCHMARK))

    The process is pinned before `measure` is called and after the module was imported. What
    reads the number of cores when it is imported, such as torch, is to be imported by `measure`.
    """

    name: str
    """Of its module, its tables and its file."""
    doc: str | None
    """What `--help` says."""
    settings: Callable[[Sampling], S]
    """The work, with the sampling that was asked for. They are written to the file."""
    measure: Callable[[S, str], Results]
    """Measures with these settings. The text is what was given by `--only`: it belongs into
    `Results(only=text)`, and each comparison is made where `Results.wants` its name."""
    title: str = ""
    """Over the table of rows; unused without rows, as are `names`."""
    names: tuple[str, str] = ("", "")
    """Of the reference and the candidate, as the headings of columns."""
    packages: tuple[str, ...] = ("esper-morphogenetic", "numpy", "jax", "jaxlib")
    """Distributions whose versions are written to the file."""
    quick: int = 90
    """Rounds of a rough look."""
    standard: Sampling = dataclasses.field(default_factory=Sampling)
    """What is done where nothing else is asked for."""
    pinned: bool = True
    """Whether it runs on one core, jax in the calling thread: a step's cost is then all of it,
    none hidden behind the step before. Otherwise each of XLA's operations has one thread."""
    gpu: bool = False
    """Whether jax may find a GPU."""

    @property
    def path(self) -> Path:
        """The file of a whole run that is asked for no other."""
        return Path(f"runs/bench/{self.name}.json")

    @property
    def partial_path(self) -> Path:
        """The file of a run of some comparisons that is asked for no other."""
        return self.path.with_suffix(".only.json")


class Options(NamedTuple):
    """What was asked for."""

    sampling: Sampling
    only: str
    json: Path


def run(benchmark: Benchmark[Any], argv: Sequence[str] | None = None) -> int:
    """Measure, print all tables and write the file.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0; 2 where no comparison has the name that was asked for, and 130
        after Ctrl-C, in both of which nothing is written.

    Raises:
        SystemExit: with status 2, for bad usage.
    """
    asked = parse(benchmark, argv)
    try:
        return _measure_and_write(benchmark, asked)
    except KeyboardInterrupt:
        _say(benchmark, "interrupted, nothing is written")
        return INTERRUPTED


def _measure_and_write(benchmark: Benchmark[Any], asked: Options) -> int:
    core = _prepare(benchmark)
    started = time.perf_counter()
    before = machine(core, benchmark.packages)
    settings = benchmark.settings(asked.sampling)
    results: Results = benchmark.measure(settings, asked.only)
    if results.nothing_wanted:
        names = "".join(f"\n  {name}" for name in dict.fromkeys(results.offered))
        _say(
            benchmark,
            f"no comparison has {asked.only!r} in its name, nothing is written;"
            f" the comparisons are{names}",
        )
        return 2
    if asked.only:
        kept = "" if asked.json == benchmark.path else f"; {benchmark.path} is left as it is"
        results.notes.append(f"Only comparisons with {asked.only!r} in their names{kept}.")
    finish(
        console(),
        results,
        benchmark=benchmark.name,
        title=benchmark.title,
        names=benchmark.names,
        settings=settings,
        machine=before,
        path=asked.json,
        started=started,
    )
    return 0


def _prepare(benchmark: Benchmark[Any]) -> int | None:
    """Set the process up for measuring; the core that it is pinned to."""
    core = None
    if benchmark.pinned:
        core = one_core()
    else:
        one_thread()
    # The command that starts all benchmarks takes its options from here, and needs no jax.
    import jax

    if not benchmark.gpu:
        jax.config.update("jax_platforms", "cpu")
    if benchmark.pinned:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    return core


def _say(benchmark: Benchmark[Any], message: str) -> None:
    print(f"experiments.bench.{benchmark.name}: {message}", file=sys.stderr)


def parse(benchmark: Benchmark[Any], argv: Sequence[str] | None = None) -> Options:
    """Read the command line; on bad usage says what is wrong and exits with status 2."""
    quick, standard = benchmark.quick, benchmark.standard
    parser = argparse.ArgumentParser(
        prog=f"experiments.bench.{benchmark.name}", description=benchmark.doc
    )
    add_shared(parser, f"{quick} rounds: a rough look")
    parser.add_argument("--only", default="", help="only comparisons whose names contain this text")
    parser.add_argument(
        "--json",
        type=Path,
        help=f"the file; by default {benchmark.path}, or with --only {benchmark.partial_path}",
    )
    options = parser.parse_args(argv)
    rounds: int = options.rounds or (quick if options.quick else standard.rounds)
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
    path = benchmark.partial_path if options.only else benchmark.path
    return Options(asked, options.only, options.json or path)


def add_shared(parser: argparse.ArgumentParser, quick: str) -> None:
    """The options that are one benchmark's and those of all of them; `quick` is a help text."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=_rounds, help="how often every variant is timed")
    parser.add_argument(
        "--cpu-clock",
        action="store_true",
        help="count the process's own time, for machines that others use too",
    )


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)

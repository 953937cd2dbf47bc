"""How fast kernels are compiled, and how soon one trains: `python -m experiments.bench.compile`.

Kernels a second: blueprints for signatures, each with programs of its own, and one blueprint with
many seeds, whose kernels share programs; in this process, and in pools of 1 and 2 worker processes
that have started and compiled before; and once more with the workers' start included. No jobs but
those that share programs on purpose are of a shape that was compiled before.

First step: seconds from the start of a process to the result of the first training step with a
kernel of which it knows the library's folder and the id; three linear layers in torch and in
Equinox. *Cold*: the kernel was never verified, so that a child process does it. *Verdict
remembered*: it was, by an earlier process with the same ESPER_CACHE_DIR. *jax's programs kept*: and
jax finds all that it compiles in JAX_COMPILATION_CACHE_DIR. *Program known*: a second kernel with
the same program, in the same process.

Unlike other benchmarks it is not pinned, since workers are to run beside each other; XLA and torch
have one thread in each process. `--rounds` is how often each is timed, 9 times at most, one after
the other in each round. Times are of the clock on the wall, whatever is asked for.
"""

import dataclasses
import os
import sys

from experiments.bench._command import Benchmark, run
from experiments.bench._first_step import measure_first_step
from experiments.bench._paired import Sampling
from experiments.bench._results import Results
from experiments.bench._throughput import measure_throughput


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    blueprints: tuple[str, ...] = (
        "low_rank", "residual_mlp", "gated", "bottleneck",
        "norm_mlp", "geglu", "dense_concat", "parallel_adapter",
    )  # fmt: skip
    examples: tuple[tuple[int, ...], ...] = ((), (16,))
    """Shapes without the features: a vector, and a sequence of 16."""
    features: int = 64
    """In and out, of the first batch; each further batch has one more."""
    seeds: int = 32
    """Of the blueprint `seeded`."""
    seeded: str = "residual_mlp"
    starts: int = 3
    """In how many of the rounds the workers' start is timed."""
    faces: tuple[str, ...] = ("torch", "jax")
    most_rounds: int = 9

    @property
    def rounds(self) -> int:
        """How often each is timed."""
        return min(self.sampling.rounds, self.most_rounds)


def measure(settings: Settings, only: str = "") -> Results:
    """All comparisons."""
    results = Results(only=only)
    measure_throughput(results, settings)
    measure_first_step(results, settings)
    if results.nothing_wanted:
        return results
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    results.notes += [
        (
            f"Not pinned: {usable} cores could be used. Load over 1, 5 and 15 minutes, at the end:"
            f" {', '.join(f'{value:.1f}' for value in load) or 'not known'}."
        ),
        (
            "Of the earlier attempt there is no figure to set beside these: its executor refused"
            " what its compiler made, and no kernel ever ran."
        ),
    ]
    return results


BENCHMARK = Benchmark(
    name="compile",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    packages=("esper-morphogenetic", "numpy", "jax", "jaxlib", "torch", "equinox", "pebble"),
    quick=2,
    standard=Sampling(rounds=5, builds=1),
    pinned=False,
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

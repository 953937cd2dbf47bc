"""What trust costs: `python -m experiments.bench.trust`.

For each blueprint: what is done before a child process is asked (the file is read with all digests,
its TorchScript is looked at as data), the whole static scan (the StableHLO and every VJP in it too,
parsed and walked, which is left to the child), and the question whether it is trusted, once it is.
For one of them: a verdict with a cold child process, which starts Python, jax and
torch, compiles and runs both programs; and a verdict on a kernel whose programs are known.

The child may run on all processors; the rest is pinned to one core. `--rounds` is how often each
is timed, 200 at most; three children are started, whatever is asked for.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Sampling
from experiments.bench._results import Check, Figure, Results

if TYPE_CHECKING:
    from esper.artifacts import Artifact
    from esper.contracts import KernelSignature
    from esper.tezzeret import BlueprintIR


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    features: int = 64
    length: int = 16
    """Of sequences and signals, and of a side of images."""
    children: int = 3
    scan_milliseconds: float = 10.0
    """Of what is done before the child."""
    trusted_microseconds: float = 5.0


def median(call: Callable[[], object], settings: Settings, repeats: int = 1) -> float:
    """Median seconds of one call."""
    clock = time.perf_counter if settings.sampling.clock == "wall" else time.process_time
    call()
    taken = []
    for _ in range(min(settings.sampling.rounds, 200)):
        started = clock()
        for _ in range(repeats):
            call()
        taken.append((clock() - started) / repeats)
    return float(np.median(taken))


@contextlib.contextmanager
def all_processors() -> Iterator[None]:
    """Undo the pinning: a child would inherit it, and share the core with this process."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)


def measure_verdicts(name: str, artifact: "Artifact", settings: Settings) -> Results:
    """A verdict with a cold child, and one on programs that are known."""
    from esper.artifacts import VerdictStore, verify

    found = Results()
    cold, known = [], []
    for _ in range(settings.children):
        with tempfile.TemporaryDirectory() as folder, VerdictStore(folder) as verdicts:
            with all_processors():
                started = time.perf_counter()
                verdict = verify(artifact.data, verdicts=verdicts)
                cold.append(time.perf_counter() - started)
            known.append(median(lambda v=verdicts: verify(artifact.data, verdicts=v), settings))
        found.checks.append(Check(f"{name}: accepted", "True", str(verdict.accepted)))
        held = ", ".join(verdict.protections) or "nothing"
        found.notes = [f"The child was held by: {held}.", *(f"Not: {m}." for m in verdict.missing)]
    found.figures.append(Figure(f"{name}, the child cold", float(np.median(cold)), "s"))
    found.figures.append(Figure(f"{name}, its programs known", 1e3 * float(np.median(known)), "ms"))
    return found


def job_of(name: str, settings: Settings) -> tuple["BlueprintIR", "KernelSignature"]:
    """A blueprint of the library, and a signature of the first kind that it takes."""
    from esper.contracts import KernelSignature
    from esper.tezzeret import load_blueprint

    features, length = settings.features, settings.length
    shapes = {
        "vector": (features,),
        "sequence": (length, features),
        "signal": (features, length),
        "image": (features, length, length),
    }
    blueprint = load_blueprint(name)
    shape = shapes[blueprint.takes[0]]
    return blueprint, KernelSignature(input_shape=shape, output_shape=shape)


def measure(settings: Settings, only: str) -> Results:
    """All comparisons."""
    from esper.artifacts import ensure_trusted, read_artifact, scan, trust
    from esper.artifacts._scan import scan_sources
    from esper.tezzeret import blueprint_names, compile_blueprint

    results = Results(only=only)
    figures = results.figures
    for name in blueprint_names():
        if not results.wants(name):
            continue
        artifact = compile_blueprint(*job_of(name, settings))
        taken = 1e3 * median(lambda a=artifact: scan_sources(read_artifact(a.data)), settings)
        figures.append(Figure(f"{name}: before the child", taken, "ms", settings.scan_milliseconds))
        taken = 1e3 * median(lambda a=artifact: scan(a), settings)
        figures.append(Figure(f"{name}: whole scan", taken, "ms"))
        trust(artifact)
        taken = 1e6 * median(lambda a=artifact: ensure_trusted(a), settings, repeats=1000)
        figures.append(Figure(f"{name}: is trusted", taken, "µs", settings.trusted_microseconds))
    name = "residual_mlp: verify"
    if results.wants(name):
        artifact = compile_blueprint(*job_of("residual_mlp", settings))
        found = measure_verdicts(name, artifact, settings)
        for kind in ("checks", "figures", "notes"):
            getattr(results, kind).extend(getattr(found, kind))
    return results


BENCHMARK = Benchmark(
    name="trust",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    packages=("esper-morphogenetic", "numpy", "jax", "jaxlib", "torch", "pyseccomp"),
)

if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

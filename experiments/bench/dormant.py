"""What a dormant seed costs: `python -m experiments.bench.dormant`.

A wrapped network in which nothing is grafted is set against its bare twin: the
same layers on the same parameters. In JAX the compiled programs are compared as
text, in torch the captured graphs; then both are timed. The second bare twin
shows what the measurement cannot tell apart. Nothing fails here: a target that
is not met is printed as not met.

JAX runs each step in the calling thread, to its end: what is compared is a
step's cost, none of it hidden behind the step before.
"""

import sys

from experiments.bench._command import Benchmark, run
from experiments.bench._dormant import Settings
from experiments.bench._dormant_jax import (
    measure_core,
    measure_equinox,
    measure_flax,
    measure_layers,
    measure_transformer,
)
from experiments.bench._results import Results


def measure_jax(settings: Settings, only: str = "") -> Results:
    """The core, its layers, and the faces of Equinox and Flax."""
    results = Results(only=only)
    for depth in dict.fromkeys((1, settings.depth)):
        measure_core(results, settings, depth)
        measure_equinox(results, settings, depth)
        measure_flax(results, settings, depth)
    measure_layers(results, settings)
    measure_transformer(results, settings)
    return results


def measure(settings: Settings, only: str = "") -> Results:
    """JAX, then torch."""
    # torch reads the number of cores when it is imported.
    import torch

    from experiments.bench._dormant_torch import measure_torch

    torch.set_num_threads(1)
    results = measure_jax(settings, only)
    measure_torch(results, settings)
    return results


BENCHMARK = Benchmark(
    name="dormant",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="Dormant times: median of paired ratios (interquartile range)",
    names=("bare", "dormant"),
    packages=("esper-morphogenetic", "numpy", "jax", "jaxlib", "equinox", "flax", "torch"),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

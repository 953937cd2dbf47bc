"""What a dormant seed costs: `python -m experiments.bench.dormant`.

A wrapped network in which nothing is grafted is set against its bare twin: the
same layers on the same parameters. In JAX the compiled programs are compared as
text, in torch the captured graphs; then both are timed. The second bare twin
shows what the measurement cannot tell apart. Nothing fails here: a target that
is not met is printed as not met.

JAX runs each step in the calling thread, to its end: what is compared is a
step's cost, none of it hidden behind the step before.
"""

import time
from collections.abc import Sequence

import jax

from experiments.bench._command import parse
from experiments.bench._dormant import Settings
from experiments.bench._dormant_jax import (
    measure_core,
    measure_equinox,
    measure_flax,
    measure_layers,
    measure_transformer,
)
from experiments.bench._paired import Sampling, one_core
from experiments.bench._results import Results, console, finish, machine

PACKAGES = ("esper-morphogenetic", "numpy", "jax", "jaxlib", "equinox", "flax", "torch")


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


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    asked = parse("dormant", __doc__, quick=90, standard=Sampling(), argv=argv)
    core = one_core()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # torch reads the number of cores when it is imported.
    import torch

    from experiments.bench._dormant_torch import measure_torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    before = machine(core, PACKAGES)
    settings = Settings(sampling=asked.sampling)
    results = measure_jax(settings, asked.only)
    measure_torch(results, settings)
    finish(
        console(),
        results,
        benchmark="dormant",
        title="Dormant times: median of paired ratios (interquartile range)",
        names=("bare", "dormant"),
        settings=settings,
        machine=before,
        path=asked.json,
        started=started,
    )


if __name__ == "__main__":
    main()

"""What running a kernel straight from its artifact costs: `python -m experiments.bench.executor`.

`execute_kernel`, which looks the kernel up, checks the input, waits for the result and takes the
time, against the bare program with the same parameters, in torch and in jax. The programs of an
artifact against what they were generated from: its StableHLO against the blueprint's function in
jax, and its TorchScript against the same operations in eager torch and through `torch.compile`.
And the time in which a kernel is loaded, and what a circuit breaker adds to a call.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Call, Sampling, contest, starting_with
from experiments.bench._results import Check, Figure, Results
from experiments.bench._steps import fresh


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    blueprint: str = "residual_mlp"
    sizes: tuple[tuple[int, int], ...] = ((64, 32), (512, 32))
    """Features in and out, and batch."""
    width: int = 16
    """Of the kernel's hidden layer."""
    loads: int = 15
    """How often each load is timed; the median counts."""
    compiled: bool = True
    """Whether torch.compile is among the variants: it takes a compiler of C++."""
    seed: int = 0


def artifacts(settings: Settings, features: int) -> list[Any]:
    """Two kernels of one program, with parameters away from birth."""
    from esper.contracts import KernelSignature
    from esper.tezzeret import compile_blueprint, load_blueprint

    signature = KernelSignature(input_shape=(features,), output_shape=(features,))
    blueprint = load_blueprint(settings.blueprint)
    return [
        with_random_params(
            compile_blueprint(blueprint, signature, sizes={"width": settings.width}),
            settings.seed + i,
        )
        for i in range(2)
    ]


def with_random_params(artifact: Any, seed: int) -> Any:
    """The same programs with other parameters: an artifact of its own."""
    from esper.artifacts import rewrite_artifact

    random = np.random.default_rng(seed)
    params = {
        name: random.normal(scale=p.shape[-1] ** -0.5, size=p.shape).astype(np.float32)
        for name, p in artifact.params.items()
    }
    return rewrite_artifact(artifact, params=params)


def trusting(**options: Any) -> Any:
    """An executor that runs what was compiled here."""
    from esper.execution._executor import RealKernelExecutor

    return RealKernelExecutor(trust=lambda artifact: None, **options)


def compare_torch(results: Results, settings: Settings, features: int, batch: int) -> None:
    """One size, in torch."""
    executed = f"torch {features}, batch {batch}: execute_kernel"
    programs = f"torch {features}, batch {batch}: programs"
    wanted = results.wants(executed), results.wants(programs)
    if not any(wanted):
        return
    import torch

    from esper.execution import load_torch_kernel

    artifact = artifacts(settings, features)[0]
    x = torch.randn(batch, features, generator=torch.Generator().manual_seed(settings.seed))
    params = [torch.tensor(p) for p in artifact.params.values()]

    def without_gradients(program: Callable[..., Any], *args: Any) -> Any:
        with torch.no_grad():
            return program(*args)

    def build_executed() -> Mapping[str, Call]:
        # Loading gives each the same program; what is measured is what stands around it.
        program = load_torch_kernel(artifact, route="torchscript").program
        execute = partial(trusting().execute_kernel, artifact)
        bare = partial(without_gradients, program, *params, x)
        return {
            "bare": bare,
            "again": partial(without_gradients, program, *params, x),
            "execute_kernel": partial(without_gradients, execute, x),
        }

    def build_programs() -> Mapping[str, Call]:
        eager: Any = load_torch_kernel(artifact, route="native").program
        script = load_torch_kernel(artifact, route="torchscript").program
        variants: dict[str, Any] = {"eager": eager, "again": eager, "TorchScript": script}
        if settings.compiled:
            variants["torch.compile"] = torch.compile(eager.function, fullgraph=True)
        arguments: dict[str, tuple[Any, ...]] = dict.fromkeys(variants, (*params, x))
        if settings.compiled:
            arguments["torch.compile"] = (None, *params, x)  # a method's function
        return {
            name: partial(without_gradients, program, *arguments[name])
            for name, program in variants.items()
        }

    if wanted[0]:
        contested(results, settings, executed, build_executed)
    if wanted[1]:
        contested(results, settings, programs, build_programs)


def compare_jax(results: Results, settings: Settings, features: int, batch: int) -> None:
    """One size, in jax."""
    executed = f"jax {features}, batch {batch}: execute_kernel"
    programs = f"jax {features}, batch {batch}: programs"
    steps = f"jax {features}, batch {batch}: programs, with gradients"
    wanted = results.wants(executed), results.wants(programs), results.wants(steps)
    if not any(wanted):
        return
    from esper.execution import load_jax_kernel

    artifact = artifacts(settings, features)[0]
    kernel = load_jax_kernel(artifact)
    exported, native = kernel.program.apply, kernel.program.twin
    assert native is not None
    x = jax.random.normal(jax.random.key(settings.seed), (batch, features))

    def build_executed() -> Mapping[str, Call]:
        bare = fresh(exported)
        execute = partial(trusting(backend="jax").execute_kernel, artifact)
        return {
            "bare": partial(bare, kernel.params, x),
            "again": partial(fresh(exported), kernel.params, x),
            "execute_kernel": partial(execute, x),
        }

    def gradients(apply: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda params, x: jnp.sum(apply(params, x) ** 2), argnums=(0, 1))

    def build_programs(wrapped: Callable[..., Any]) -> Mapping[str, Call]:
        return {
            name: partial(fresh(wrapped(apply)), kernel.params, x)
            for name, apply in (("native", native), ("again", native), ("StableHLO", exported))
        }

    if wanted[0]:
        contested(results, settings, executed, build_executed)
    if wanted[1]:
        contested(results, settings, programs, partial(build_programs, lambda apply: apply))
    if wanted[2]:
        contested(results, settings, steps, partial(build_programs, gradients))


def contested(
    results: Results, settings: Settings, name: str, build: Callable[[], Mapping[str, Call]]
) -> None:
    """All variants against the first, whose result theirs must be."""
    from esper_functional import difference

    calls = build()
    expected = jax.tree.map(np.asarray, next(iter(calls.values()))())
    for variant, call in calls.items():
        found = jax.tree.map(np.asarray, call())
        within = all(
            difference(ours, theirs).within
            for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        )
        if variant != "again":
            results.checks.append(Check(f"{name}, {variant}: agrees", "True", str(within)))
    candidates = dict.fromkeys(list(calls)[2:])
    results.rows += contest(
        name, candidates, starting_with(calls, build), settings.sampling, jax.block_until_ready
    )


def measure_loads(results: Results, settings: Settings) -> None:
    """A kernel from its bytes, with nothing at hand, with its program at hand, and with itself."""
    from esper.execution import _load

    caches = (_load._jax_program, _load._torch_program)
    features = settings.sizes[0][0]
    for backend in ("torch", "jax"):
        names = {
            kind: f"load for {backend}, {kind}"
            for kind in ("nothing at hand", "its program at hand", "at hand")
        }
        wanted = [results.wants(name) for name in names.values()]  # all are noted
        if not any(wanted):
            continue
        first, second = artifacts(settings, features)
        taken: dict[str, list[float]] = {name: [] for name in names.values()}
        for _ in range(settings.loads):
            for cache in caches:
                cache.cache_clear()
            executor = trusting(backend=backend)
            for kind, artifact in zip(names, (first, second, second), strict=True):
                begun = time.perf_counter()
                executor.load(artifact)
                taken[names[kind]].append(time.perf_counter() - begun)
        results.figures += [
            Figure(name, float(np.median(seconds)) * 1e6, "µs") for name, seconds in taken.items()
        ]


def measure_guard(results: Results, settings: Settings) -> None:
    """A call of nothing, and the same one through a closed breaker."""
    name = "a guarded call, breaker closed"
    if not results.wants(name):
        return
    from esper.recovery import ErrorRecoveryManager

    guard = ErrorRecoveryManager().guard("service")

    def nothing() -> int:
        return 1

    def build() -> Mapping[str, Call]:
        return {"bare": nothing, "again": nothing, "guarded": partial(guard, nothing)}

    (row,) = contest(name, {"guarded": None}, build, settings.sampling)
    added = row.candidate.microseconds - row.reference.microseconds
    results.figures.append(Figure(f"{name}: added", added, "µs"))


def measure(settings: Settings, only: str = "") -> Results:
    """All comparisons."""
    # torch reads the number of cores when it is imported.
    import torch

    torch.set_num_threads(1)
    results = Results(only=only)
    for features, batch in settings.sizes:
        compare_torch(results, settings, features, batch)
        compare_jax(results, settings, features, batch)
    measure_loads(results, settings)
    measure_guard(results, settings)
    return results


BENCHMARK = Benchmark(
    name="executor",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="Kernels from their artifacts: median of paired ratios (interquartile range)",
    names=("reference", "ours"),
    packages=("esper-morphogenetic", "numpy", "jax", "jaxlib", "torch"),
    quick=30,
    standard=Sampling(rounds=240, builds=3, budget=6.0),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

"""Kernels a second, in this process and in pools of workers."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from experiments.bench._results import Check, Figure, Results

if TYPE_CHECKING:
    from esper.tezzeret import CompileJob, CompilePool
    from experiments.bench.compile import Settings

WORKERS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What became of a batch of jobs."""

    seconds: float
    at_work: float
    """Seconds that were spent inside of jobs, added up."""
    ids: frozenset[str]
    """Of the kernels."""


def distinct_jobs(settings: "Settings", number: int) -> "list[CompileJob]":
    """Each blueprint for each signature; of another number, other signatures."""
    from esper.contracts import KernelSignature
    from esper.tezzeret import CompileJob, load_blueprint

    shapes = [(*shape, settings.features + number) for shape in settings.examples]
    return [
        CompileJob(load_blueprint(name), KernelSignature(input_shape=shape, output_shape=shape))
        for name in settings.blueprints
        for shape in shapes
    ]


def seeded_jobs(settings: "Settings", number: int) -> "list[CompileJob]":
    """One blueprint for one signature that `distinct_jobs` never has, with many seeds."""
    from esper.contracts import KernelSignature
    from esper.tezzeret import CompileJob, load_blueprint

    features = settings.features + number
    signature = KernelSignature(input_shape=(features,), output_shape=(features + 1,))
    blueprint = load_blueprint(settings.seeded)
    return [CompileJob(blueprint, signature, init_seed=seed) for seed in range(settings.seeds)]


def compiled_here(jobs: "list[CompileJob]") -> Batch:
    """In this process, one after the other."""
    from esper.tezzeret import compile_blueprint

    begun = time.perf_counter()
    ids = frozenset(
        compile_blueprint(job.blueprint, job.signature, init_seed=job.init_seed).kernel_id
        for job in jobs
    )
    seconds = time.perf_counter() - begun
    return Batch(seconds, seconds, ids)


def compiled_in(pool: "CompilePool", jobs: "list[CompileJob]") -> Batch:
    """In a pool's workers.

    Raises:
        EsperError: where a job failed.
    """
    ids: set[str] = set()
    at_work = 0.0
    begun = time.perf_counter()
    for outcome in pool.compile(jobs):
        if outcome.artifact is None:
            assert outcome.error is not None
            raise outcome.error
        ids.add(outcome.artifact.kernel_id)
        at_work += outcome.seconds
    return Batch(time.perf_counter() - begun, at_work, frozenset(ids))


def compiled_from_start(workers: int, jobs: "list[CompileJob]") -> Batch:
    """In a pool that is started for it; its end is not timed."""
    from esper.tezzeret import CompilePool

    begun = time.perf_counter()
    with CompilePool(workers=workers) as pool:
        batch = compiled_in(pool, jobs)
        return dataclasses.replace(batch, seconds=time.perf_counter() - begun)


@contextlib.contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    """Variables that processes inherit which are started meanwhile; None for none."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """Without programs that jax kept on earlier occasions, here and in workers."""
    import jax

    kept = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with environment(JAX_ENABLE_COMPILATION_CACHE="false"):
            yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def started(workers: int, stack: contextlib.ExitStack, settings: "Settings") -> "CompilePool":
    """A pool whose workers have all compiled something.

    Raises:
        RuntimeError: where they do not come to work beside each other.
    """
    from esper.tezzeret import CompilePool

    pool = stack.enter_context(CompilePool(workers=workers))
    for attempt in range(10):
        batch = compiled_in(pool, distinct_jobs(settings, settings.rounds + attempt))
        # More seconds of work than have passed were spent by more than one.
        if workers == 1 or batch.at_work > batch.seconds:
            return pool
    raise RuntimeError(f"of {workers} workers one did all the work, ten times over")


def measure_throughput(results: Results, settings: "Settings") -> None:
    """Kernels a second, of both batches and with the workers' start."""
    kinds = len(settings.blueprints) * len(settings.examples)
    distinct = f"compile {kinds} kernels with programs of their own"
    seeded = f"compile {settings.seeds} kernels that share programs"
    from_start = f"{distinct}, workers started for it"
    wanted = {name: results.wants(name) for name in (distinct, seeded, from_start)}
    if not any(wanted.values()):
        return
    import torch

    from esper.tezzeret import _compile

    torch.set_num_threads(1)  # as a worker does
    taken: dict[str, dict[str, list[Batch]]] = {name: {} for name in wanted}
    with compiling_anew(), contextlib.ExitStack() as stack:
        here = "in this process"
        # What this process has compiled before is no part of it.
        _compile._programs.cache_clear()
        variants: dict[str, Callable[[list[CompileJob]], Batch]] = {here: compiled_here}
        if wanted[distinct] or wanted[seeded]:
            compiled_here(distinct_jobs(settings, settings.rounds))
            for workers in WORKERS:
                pool = started(workers, stack, settings)
                variants[named(workers)] = lambda jobs, pool=pool: compiled_in(pool, jobs)
        fresh = {named(n): lambda jobs, n=n: compiled_from_start(n, jobs) for n in WORKERS}
        made = 0
        for turn in range(settings.rounds):
            for name, jobs_of, calls in (
                (distinct, distinct_jobs, variants),
                (seeded, seeded_jobs, variants),
                (from_start, distinct_jobs, fresh),
            ):
                if not wanted[name] or (calls is fresh and turn >= settings.starts):
                    continue
                jobs = jobs_of(settings, turn)
                for variant in rotated(list(calls), turn):
                    known = _compile._programs.cache_info().misses
                    batch = calls[variant](jobs)
                    taken[name].setdefault(variant, []).append(batch)
                    if name == distinct and variant == here:
                        made += _compile._programs.cache_info().misses - known
    for name, found in taken.items():
        if found:
            report_throughput(results, name, found)
    if wanted[distinct]:
        expected = str(kinds * settings.rounds)
        results.checks.append(
            Check(f"{distinct}, {here}: programs compiled, all rounds", expected, str(made))
        )


def named(workers: int) -> str:
    """A pool's variant, as it is printed."""
    return f"{workers} worker{'s' if workers > 1 else ''}"


def rotated(names: list[str], turn: int) -> list[str]:
    """So that none is always the first."""
    start = turn % len(names)
    return names[start:] + names[:start]


def report_throughput(results: Results, name: str, found: Mapping[str, list[Batch]]) -> None:
    """One comparison: kernels a second, and 2 workers against 1."""
    one, two = (found[named(workers)] for workers in WORKERS)
    same = all(
        len({batch.ids for batch in turn}) == 1 for turn in zip(*found.values(), strict=True)
    )
    results.checks.append(Check(f"{name}: the same bytes everywhere", "True", str(same)))
    if "in this process" in found and "share" not in name:
        # Workers that start, or have next to nothing to do, spend little of the time at work.
        beside = all(batch.at_work > batch.seconds for batch in two)
        results.checks.append(Check(f"{name}: 2 workers at work at once", "True", str(beside)))
    for variant, batches in found.items():
        rate = float(np.median([len(batch.ids) / batch.seconds for batch in batches]))
        results.figures.append(Figure(f"{name}: {variant}", rate, "kernels/s"))
    ratios = [a.seconds / b.seconds for a, b in zip(one, two, strict=True)]
    results.figures.append(
        Figure(f"{name}: 2 workers against 1", float(np.median(ratios)), "times as many")
    )
    results.notes.append(
        f"{name}: 2 workers against 1 from {min(ratios):.2f} to {max(ratios):.2f} in"
        f" {len(ratios)} rounds."
    )

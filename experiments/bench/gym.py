"""Environments of the gym: `python -m experiments.bench.gym`.

One step of many environments at once, mapped, is set against a Python loop over the same step of
one, jitted. A step is a choice, optimiser steps of network and twin, and what is measured then. The
loop takes each environment in turn, so that its time for many is that of a few, times how many.
Nothing is grafted. That suits the loop: it runs no kernel, where all are computed when mapped.
With `--quick`, or as few rounds, the environment is a tiny one, in fewer numbers.
"""

import dataclasses
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper.tamiyo.gym import OFFERS, Environment
from esper.tamiyo.policy import Choice
from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Sampling, contest, starting_with
from experiments.bench._results import Check, Results


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work; there is no target."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    counts: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    looped: int = 4
    """Environments that the loop takes, at most."""
    steps: int = 40
    """Of the optimiser, in a step."""
    depth: int = 2
    seeds: int = 2
    """Of each layer."""
    offers: int = 4
    seed: int = 0


_QUICK = 3


def settings_of(sampling: Sampling) -> Settings:
    """The work; less of it for a rough look, most of whose time would be compiling."""
    if sampling.rounds > _QUICK:
        return Settings(sampling)
    return Settings(sampling, counts=(1, 16, 256), steps=2, depth=1, seeds=1, offers=1)


class _Programs(NamedTuple):
    """What all numbers of environments share, so that it compiles once."""

    environment: Environment
    one: Any
    """A step, jitted."""


def compare(results: Results, settings: Settings, programs: _Programs, count: int) -> None:
    """One number of environments."""
    name = f"{count} environments"
    if not results.wants(name):
        return
    environment, one = programs
    looped = min(count, settings.looped)
    states, _ = jax.jit(jax.vmap(environment.reset))(
        jax.random.split(jax.random.key(settings.seed), count)
    )
    still = Choice(*(jnp.zeros(count, jnp.int32) for _ in Choice._fields))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], (states, still)) for i in range(looped)]
    costs: dict[str, float] = {}

    def build() -> dict[str, Any]:
        start = time.perf_counter()
        mapped = jax.jit(jax.vmap(environment.step)).lower(states, still).compile()
        costs["compile s"] = time.perf_counter() - start
        memory = mapped.memory_analysis()
        if memory is not None:
            costs["temporary MB"] = memory.temp_size_in_bytes / 1e6

        def loop() -> Any:
            return [one(*own) for own in each]

        return {"loop": loop, "again": loop, "vmap": partial(mapped, states, still)}

    calls = build()
    found, expected = calls["vmap"]()[1].info["loss"], calls["loop"]()
    same = all(
        np.isclose(found[i], own[1].info["loss"], rtol=1e-4) for i, own in enumerate(expected)
    )
    results.checks.append(Check(f"{name}: mapped as looped", "yes", "yes" if same else "no"))
    (row,) = contest(
        name, {"vmap": None}, starting_with(calls, build), settings.sampling, jax.block_until_ready
    )
    extra = {
        "loop steps/s": looped / row.reference.microseconds * 1e6,
        "vmap steps/s": count / row.candidate.microseconds * 1e6,
        **costs,
    }
    results.rows.append(dataclasses.replace(row, extra=extra))


def measure(settings: Settings, only: str = "") -> Results:
    """All numbers of environments."""
    results = Results(only=only)
    environment = Environment(
        steps=settings.steps,
        depth=settings.depth,
        seeds=settings.seeds,
        offers=OFFERS[-settings.offers :],
    )
    programs = _Programs(environment, jax.jit(environment.step))
    for count in settings.counts:
        compare(results, settings, programs, count)
    return results


BENCHMARK = Benchmark(
    name="gym",
    doc=__doc__,
    settings=settings_of,
    measure=measure,
    title="A step of the gym: all mapped over a few looped, median of ratios (interquartile range)",
    names=("loop", "vmap"),
    quick=_QUICK,
    # A call with thousands of environments takes half a minute.
    standard=Sampling(rounds=20, builds=1, warmup=1, budget=60.0, least=3),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

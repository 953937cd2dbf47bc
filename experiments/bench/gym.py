"""Environments of the gym: `python -m experiments.bench.gym`.

One step of many environments at once, mapped, is set against a Python loop over the same step of
one, jitted. A step is a choice, optimiser steps of network and twin, and what is measured then. The
loop takes each environment in turn, so that its time for many is that of a few, times how many.
"""

import dataclasses
import sys
import time
from functools import partial
from typing import Any

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
    offers: int = 4
    seed: int = 0


def compare(results: Results, settings: Settings, count: int) -> None:
    """One number of environments."""
    name = f"{count} environments"
    if not results.wants(name):
        return
    environment = Environment(
        steps=settings.steps, depth=settings.depth, offers=OFFERS[-settings.offers :]
    )
    looped = min(count, settings.looped)
    states, _ = jax.jit(jax.vmap(environment.reset))(
        jax.random.split(jax.random.key(settings.seed), count)
    )
    still = Choice(*(jnp.zeros(count, jnp.int32) for _ in Choice._fields))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], (states, still)) for i in range(looped)]
    costs: dict[str, float] = {}

    def build() -> dict[str, Any]:
        one = jax.jit(environment.step)
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
    for count in settings.counts:
        compare(results, settings, count)
    return results


BENCHMARK = Benchmark(
    name="gym",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="A step of the gym: all mapped over a few looped, median of ratios (interquartile range)",
    names=("loop", "vmap"),
    quick=3,
    standard=Sampling(rounds=20, builds=1),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

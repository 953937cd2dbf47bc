"""Populations of growing networks: `python -m experiments.bench.population`.

The dynamic mode holds stages as data, so that `jax.vmap` maps over networks each of
which has its own parameters, seeds and kernels. One training step of all of them is
set against a Python loop over the same step of one, jitted. Mapped, every branch of
every seed is computed for every network, whatever runs; looped, only what runs is,
at the price of one dispatch a network.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_functional import (
    Bank,
    Kernel,
    SeedState,
    advance,
    difference,
    forward_dynamic,
    make_bank,
    record_faults,
)
from experiments.bench._command import Benchmark, run
from experiments.bench._networks import Host, grafted, make_kernels, make_stack
from experiments.bench._paired import Call, Sampling, contest, starting_with
from experiments.bench._results import Check, Results


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work; there is no target."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    populations: tuple[int, ...] = (1, 4, 16, 64, 256)
    width: int = 16
    depth: int = 2
    seeds_per_layer: int = 2
    batch: int = 32
    rank: int = 4
    learning_rate: float = 0.01
    seed: int = 0


class Member(NamedTuple):
    """One growing network."""

    params: Any
    bank: Bank
    seeds: SeedState


Step = Callable[[Member, Any, Any], tuple[Member, Any]]


def make_member(settings: Settings, index: int) -> Member:
    """A network in which 0 to all of its seeds run, two programs among them."""
    seed = settings.seed + index
    host = make_stack(settings.depth, settings.width, seed)
    slots = settings.depth * settings.seeds_per_layer
    width, rank = settings.width, settings.rank
    thin = make_kernels("low rank", slots, width, rank, seed)
    wide = make_kernels("residual MLP", slots, width, rank, seed)
    kernels: dict[int, Kernel] = {i: (thin, wide)[i % 2][i] for i in range(slots)}
    places = [divmod(i, settings.seeds_per_layer) for i in range(index % (slots + 1))]
    state = grafted(settings.depth, settings.seeds_per_layer, places, 0.2)
    bank = make_bank(kernels, also=(thin[0], wide[0]))
    return jax.tree.map(jnp.asarray, Member(host.params, bank, state))


def make_step(host: Host, rate: float) -> Step:
    """One SGD step of one network, faults recorded."""

    def step(member: Member, x: Any, target: Any) -> tuple[Member, Any]:
        now = jnp.max(member.seeds.last_update) + 1
        seeds = advance(member.seeds, now)

        def loss(params: Any, kernels: Any) -> Any:
            bank = dataclasses.replace(member.bank, params=kernels)
            y, faults = forward_dynamic(host.net, params, seeds, bank, x, sites=host.sites)
            return jnp.mean((y - target) ** 2), faults

        trained = (member.params, member.bank.params)
        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, faults), grads = gradient(*trained)
        params, kernels = jax.tree.map(lambda p, g: p - rate * g, trained, grads)
        bank = dataclasses.replace(member.bank, params=kernels)
        return Member(params, bank, record_faults(seeds, faults, step=now)), value

    return step


def compare_population(results: Results, settings: Settings, count: int) -> None:
    """One size of population."""
    name = f"{count} networks"
    if not results.wants(name):
        return
    host = make_stack(settings.depth, settings.width, settings.seed)
    step = make_step(host, settings.learning_rate)
    members = [make_member(settings, i) for i in range(count)]
    shape = (2, count, settings.batch, settings.width)
    xs, targets = jax.random.normal(jax.random.key(settings.seed), shape)
    data = [(xs[i], targets[i]) for i in range(count)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    costs: dict[str, float] = {}

    def loop() -> Call:
        own = jax.jit(partial(step))

        def call() -> Any:
            return [own(member, *pair) for member, pair in zip(members, data, strict=True)]

        return call

    def build() -> Mapping[str, Call]:
        start = time.perf_counter()
        mapped = jax.jit(jax.vmap(step)).lower(together, xs, targets).compile()
        costs["compile s"] = time.perf_counter() - start
        memory = mapped.memory_analysis()
        if memory is not None:
            costs["temporary MB"] = memory.temp_size_in_bytes / 1e6
        return {"loop": loop(), "again": loop(), "vmap": partial(mapped, together, xs, targets)}

    calls = build()
    found, expected = calls["vmap"](), calls["loop"]()
    results.checks.append(Check(f"{name}: mapped as looped", "yes", same(found, expected)))
    (row,) = contest(
        name, {"vmap": None}, starting_with(calls, build), settings.sampling, jax.block_until_ready
    )
    extra = {
        "loop networks/s": count / row.reference.microseconds * 1e6,
        "vmap networks/s": count / row.candidate.microseconds * 1e6,
        **costs,
    }
    results.rows.append(dataclasses.replace(row, extra=extra))


def same(found: Any, expected: Any) -> str:
    """Whether a mapped result is that of the loop, within the table of tolerances."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(stacked), strict=True):
        own, other = np.asarray(a), np.asarray(b)
        if own.dtype.kind == "f":
            holes = np.isnan(own)
            if (holes != np.isnan(other)).any():
                return "no"
            if not difference(np.where(holes, 0, own), np.where(holes, 0, other)).within:
                return "no"
        elif (own != other).any():
            return "no"
    return "yes"


def measure(settings: Settings, only: str = "") -> Results:
    """All sizes of population."""
    results = Results(only=only)
    for count in settings.populations:
        compare_population(results, settings, count)
    return results


BENCHMARK = Benchmark(
    name="population",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="A training step of a population: median of paired ratios (interquartile range)",
    names=("loop", "vmap"),
    quick=30,
    standard=Sampling(rounds=150, builds=2),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

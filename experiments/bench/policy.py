"""What a decision of Tamiyo's policy costs: `python -m experiments.bench.policy`.

The policy's forward pass, from features to masked logits, the greedy choice and the value, against
the same network with the same parameters in torch with torch-geometric, whose results must be the
same; the features by themselves, computed by numpy from readings, in which seeds that hold nothing
are one; and a whole decision, from readings to a choice on the host. One thread, one core. Without
torch-geometric (the extra `bench`) the forward pass is timed alone, and a note says so.

The networks are residual: each site feeds two and is fed by two, all edges are walked both ways.
The forward pass is compiled with its parameters as constants, as of a policy that decides and does
not learn. Torch runs eagerly, without gradients, without the sites that fill ours up, and with all
seeds by themselves. Either runs for 20 ms at a time: the first passes after the other's find the
processor's caches full of it.
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Call, Sampling, contest, starting_with
from experiments.bench._results import Check, Figure, Results


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets, which are of `target_sites`."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    sites: tuple[int, ...] = (10, 100, 1_000, 5_000)
    seeds: int = 4
    """Of each site."""
    kernels: int = 8
    """That may be grafted."""
    width: int = 32
    rounds: int = 3
    heads: int = 4
    seed: int = 0
    target_sites: int = 1_000
    ratio: float = 1 / 5
    """Of the time of the forward pass to torch-geometric's."""
    forward_milliseconds: float = 2.5
    features_milliseconds: float = 1.0
    decision_milliseconds: float = 4.24
    decision_tail_milliseconds: float = 10.0
    """At the 95th percentile."""


def measure_sites(results: Results, settings: Settings, sites: int) -> None:
    """All comparisons at one size."""
    names = [f"{sites:,} sites: {what}" for what in ("forward", "features", "decision")]
    wanted = [results.wants(name) for name in names]  # all are noted
    if not any(wanted):
        return
    import jax
    import jax.numpy as jnp

    from esper.tamiyo.graph import ModelGraph, list_seeds, model_graph
    from esper.tamiyo.policy import Policy, best
    from experiments.bench._policy_graphs import (
        make_edges,
        make_readings,
        policy_away_from_birth,
    )

    random = np.random.default_rng(settings.seed)
    edges = make_edges(sites)
    readings = make_readings(edges, settings.seeds, settings.kernels, random)
    graph = model_graph(readings, edges, np)
    policy = policy_away_from_birth(
        settings.seed, width=settings.width, rounds=settings.rounds, heads=settings.heads
    )

    def forward_of(policy: Policy) -> Callable[[ModelGraph], Any]:
        def forward(graph: ModelGraph) -> Any:
            logits, value = policy(graph)
            return logits, best(logits), value

        return jax.jit(forward)

    on_device = jax.tree.map(jnp.asarray, list_seeds(graph))
    limit = partial(_at, settings, sites)

    def see() -> ModelGraph:
        return list_seeds(model_graph(readings, edges, np))

    if wanted[0]:
        compare_forward(results, settings, names[0], policy, graph, on_device, forward_of)
        call = partial(forward_of(policy), on_device)
        tell(results, settings, names[0], call, limit(settings.forward_milliseconds))
    if wanted[1]:
        tell(results, settings, names[1], see, limit(settings.features_milliseconds))
    if wanted[2]:

        def choose(graph: ModelGraph) -> Any:
            logits, value = policy(graph)
            return best(logits), value

        compiled = jax.jit(choose)

        def decide() -> Any:
            return jax.device_get(compiled(see()))

        targets = (settings.decision_milliseconds, settings.decision_tail_milliseconds)
        tell(results, settings, names[2], decide, *(limit(target) for target in targets))


def _at(settings: Settings, sites: int, target: float) -> float | None:
    return target if sites == settings.target_sites else None


def tell(
    results: Results,
    settings: Settings,
    name: str,
    call: Call,
    target: float | None = None,
    tail: float | None = None,
) -> None:
    """The median and the 95th percentile of single calls that follow each other."""
    import jax

    clock = time.perf_counter if settings.sampling.clock == "wall" else time.process_time
    for _ in range(settings.sampling.warmup + 1):
        jax.block_until_ready(call())
    taken = []
    for _ in range(settings.sampling.rounds):
        started = clock()
        jax.block_until_ready(call())
        taken.append(clock() - started)
    middle, high = 1e3 * np.quantile(taken, (0.5, 0.95))
    results.figures += [
        Figure(f"{name}, p50", float(middle), "ms", target),
        Figure(f"{name}, p95", float(high), "ms", tail),
    ]


def compare_forward(
    results: Results,
    settings: Settings,
    name: str,
    policy: Any,
    graph: Any,
    on_device: Any,
    forward_of: Callable[[Any], Callable[[Any], Any]],
) -> None:
    """Ours against torch-geometric's: what is found, and the time."""
    if not has_torch_geometric(results):
        return
    import jax
    import torch

    from experiments.bench._policy_torch import TorchPolicy, torch_best, torch_graph

    on_torch = torch_graph(graph)

    def run_torch(network: TorchPolicy) -> Any:
        with torch.inference_mode():
            logits, value = network(on_torch)
            return logits, torch_best(logits), value

    def build() -> Mapping[str, Call]:
        return {
            "torch-geometric": partial(run_torch, TorchPolicy(policy).eval()),
            "again": partial(run_torch, TorchPolicy(policy).eval()),
            "ours": partial(forward_of(policy), on_device),
        }

    calls = build()
    theirs, ours = calls["torch-geometric"](), jax.device_get(calls["ours"]())
    results.checks += agreement(name, ours, theirs, int(np.sum(graph.edges.there)))
    targets = {"ours": _at(settings, int(np.sum(graph.edges.there)), settings.ratio)}
    wait = jax.block_until_ready
    results.rows += contest(
        name, targets, starting_with(calls, build), settings.sampling, wait, named=False
    )


def agreement(name: str, ours: Any, theirs: Any, sites: int) -> list[Check]:
    """Whether logits, choice and value are the same; masks to the bit, the rest by the table."""
    from esper.tamiyo.policy import MASKED
    from esper_functional import difference

    logits, choice, value = ours
    pairs = {
        "kind": (logits.kind, theirs[0].kind),
        "site": (logits.site[:, :sites], theirs[0].site),
        "kernel": (logits.kernel[:sites], theirs[0].kernel),
        "seed": (logits.seed[:, :sites], theirs[0].seed),
        "alpha": (logits.alpha[:sites], theirs[0].alpha),
        "value": (value, theirs[2]),
    }
    apart = []
    for head, (found, expected) in pairs.items():
        legal = [np.asarray(own) != np.float32(MASKED) for own in (found, expected)]
        same = np.array_equal(*legal)
        # Masked logits would give the table a scale at which all else is equal.
        own, other = (np.where(legal[0], np.asarray(x), 0.0) for x in (found, expected))
        if not same or not difference(own, other, "float32").within:
            apart.append(head)
    return [
        Check(f"{name}: heads that differ", "none", ", ".join(apart) or "none"),
        Check(f"{name}: choice", str(theirs[1]), str([int(own) for own in choice])),
    ]


def has_torch_geometric(results: Results) -> bool:
    """Whether there is something to compare with; a note says why not."""
    try:
        importlib.import_module("torch_geometric")
    except ImportError as error:
        note = f"No comparison with torch-geometric: {error}. It comes with the extra `bench`."
        if note not in results.notes:
            results.notes.append(note)
        return False
    return True


def measure(settings: Settings, only: str = "") -> Results:
    """All comparisons."""
    # torch reads the number of cores when it is imported.
    import torch

    torch.set_num_threads(1)
    results = Results(only=only)
    for sites in settings.sites:
        measure_sites(results, settings, sites)
    return results


BENCHMARK = Benchmark(
    name="policy",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="The policy's forward pass: median of paired ratios (interquartile range)",
    names=("torch-geometric", "ours"),
    packages=(
        "esper-morphogenetic", "numpy", "jax", "jaxlib", "equinox", "torch", "torch-geometric",
    ),
    quick=30,
    standard=Sampling(rounds=240, builds=3, budget=20.0, sample=2e-2),
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))

"""Growing networks that were made up, as a policy reads them, of any size."""

import equinox as eqx
import jax
import numpy as np

from esper.tamiyo.graph import (
    KERNEL,
    KINDS,
    PAST,
    Edges,
    Flow,
    Node,
    Readings,
    make_topology,
    pad_topology,
)
from esper.tamiyo.policy import Policy, make_policy
from esper_functional import SeedLifecycleState


def make_edges(sites: int) -> Edges:
    """A residual network: each site feeds the next and the one after it."""
    nodes = [Node(f"layers.{i}", "linear", (64,), (64,), 4160) for i in range(sites)]
    pairs = {(i, i + step) for step in (1, 2) for i in range(sites - step)}
    return pad_topology(make_topology(nodes, Flow(tuple(range(sites)), frozenset(pairs))))


def make_readings(edges: Edges, seeds: int, kernels: int, random: np.random.Generator) -> Readings:
    """Readings of a network in the middle of a run: a third of its seeds run, some are unknown."""
    nodes = len(edges.there)
    there = edges.there[:, None]

    def drawn(*shape: int, most: float = 1.0) -> np.ndarray:
        return random.uniform(0.0, most, shape).astype(np.float32)

    stages = [SeedLifecycleState.DORMANT] * 3 + [
        SeedLifecycleState.LOADING,
        SeedLifecycleState.ACTIVE,
        SeedLifecycleState.FOSSILIZED,
    ]
    stage = np.array([int(own) for own in stages], np.uint8)[random.integers(0, 6, (nodes, seeds))]
    stage = np.where(there, stage, np.uint8(0))
    holds = stage != int(SeedLifecycleState.DORMANT)
    runs = holds & (stage != int(SeedLifecycleState.LOADING))

    def of_running(values: np.ndarray) -> np.ndarray:
        return np.where(runs, values, np.float32(np.nan))

    return Readings(
        progress=np.float32(0.5),
        train_loss=drawn(PAST),
        validation_loss=drawn(PAST),
        validation_accuracy=np.float32(0.7),
        first_loss=np.float32(1.5),
        loss_spread=np.float32(0.1),
        rollbacks=np.float32(0.0),
        parameters=np.float32(1.3),
        flops=np.float32(1.2),
        kind=np.where(edges.there, random.integers(0, len(KINDS), nodes), 0).astype(np.int32),
        sizes=np.where(there, drawn(nodes, 3, most=1e4), np.float32(0.0)),
        depth=np.where(edges.there, np.arange(nodes), 0).astype(np.float32),
        grows=edges.there & (random.random(nodes) < 0.8),
        gradient_norm=drawn(nodes),
        weight_norm=drawn(nodes, most=8.0),
        follows=drawn(nodes, 2),
        stage=stage,
        alpha=np.where(runs, drawn(nodes, seeds), np.float32(0.0)),
        health=of_running(drawn(nodes, seeds)),
        health_before=of_running(drawn(nodes, seeds)),
        worth=of_running(drawn(nodes, seeds) - np.float32(0.5)),
        worth_half=of_running(drawn(nodes, seeds)),
        age=np.where(holds, np.float32(3.0), np.float32(0.0)),
        held=np.where(holds[..., None], drawn(nodes, seeds, KERNEL), np.float32(0.0)),
        kernels=drawn(kernels, KERNEL),
        fits=there & (random.random((nodes, kernels)) < 0.8),
    )


def policy_away_from_birth(seed: int, *, width: int, rounds: int, heads: int) -> Policy:
    """A policy as training would leave it: no parameter is 0, and it is sure of some things."""
    policy = make_policy(jax.random.key(seed), width=width, rounds=rounds, heads=heads)
    random = np.random.default_rng(seed)

    def moved(leaf: jax.Array) -> jax.Array:
        return leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32)

    return jax.tree.map(lambda leaf: moved(leaf) if eqx.is_array(leaf) else leaf, policy)

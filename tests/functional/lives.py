"""Seeds with a past: stories that seeds live through, random ones, and a bank for them all."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from esper_functional import (
    Bank,
    Event,
    EventKind,
    Kernel,
    SeedLifecycleError,
    SeedState,
    apply_event,
    gather,
    init_seeds,
    kernel_from_function,
    make_bank,
    plan,
    running_seeds,
)
from tests.functional.networks import SITES, dense_kernel, filled

K = EventKind
SEEDS = 2
NOW = 7
"""The step to which stories are told."""


def low_rank(params: Any, x: Any) -> Any:
    return x @ params["a"] @ params["b"]


def root(params: Any, x: Any) -> Any:
    """NaN for each example with a negative sum, and only for those."""
    return jnp.sqrt(jnp.sum(x, axis=-1, keepdims=True)) * params["w"]


def low_rank_kernel(seed: int) -> Kernel:
    random = np.random.default_rng(seed)
    sizes = {"a": (3, 2), "b": (2, 4)}
    params = {n: jnp.asarray(random.normal(size=s), jnp.float32) for n, s in sizes.items()}
    return kernel_from_function(low_rank, params)


ROOT = kernel_from_function(root, {"w": jnp.linspace(0.5, 2.0, 4)})

KERNELS: dict[int, Kernel] = {
    0: dense_kernel(0),
    1: low_rank_kernel(1),
    2: ROOT,
    3: filled(dense_kernel(0), np.nan),
    4: dense_kernel(4, "out"),
    5: dense_kernel(5, "out"),
    6: filled(dense_kernel(0, "out"), np.inf),
}
"""By slot: three programs, one with two shapes of parameters; some fail, some on some examples."""
FITTING = {0: (0, 1, 2, 3), 1: (4, 5, 6)}
"""The slots whose kernels fit each layer."""


def bank() -> Bank:
    return make_bank(KERNELS)


_ACTIVE = [(K.LOAD, 0.0), (K.ACTIVATE, 0.6)]
_WAITING = [(K.LOAD, 0.0), (K.ACTIVATE, 0.0)]
STORIES: dict[str, list[tuple[EventKind, float]]] = {
    "dormant": [],
    "loading": [(K.LOAD, 0.0)],
    "load failed": [(K.LOAD, 0.0), (K.FAIL, 0.0)],
    "active": _ACTIVE,
    "active at 0": _WAITING,
    "active at 1": [(K.LOAD, 0.0), (K.ACTIVATE, 1.0)],
    "ramping": [*_WAITING, (K.RAMP, 0.8)],
    "incubating": [*_WAITING, (K.INCUBATE, 0.0)],
    "failed twice": [*_ACTIVE, (K.ERRORS, 2.0)],
    "incubating, failed twice": [*_WAITING, (K.INCUBATE, 0.0), (K.ERRORS, 2.0)],
    "fallback": [*_ACTIVE, (K.ERRORS, 3.0)],
    "fossil": [*_ACTIVE, (K.FOSSILIZE, 0.0)],
    "fossil in fallback": [*_ACTIVE, (K.FOSSILIZE, 0.0), (K.ERRORS, 3.0)],
    "folded fossil": [*_ACTIVE, (K.FOSSILIZE, 0.0), (K.FOLD, 0.0)],
    "unloaded": [*_ACTIVE, (K.UNLOAD, 0.0)],
}
"""What a seed goes through, as (kind, value); the slot of a LOAD is filled in."""


def told(layer: int, seed: int, story: str, slot: int) -> list[Event]:
    return [
        Event(i, layer, seed, kind, value=float(slot) if kind is K.LOAD else value, span=8)
        for i, (kind, value) in enumerate(STORIES[story])
    ]


def fold_legal(state: SeedState, events: Iterable[Event]) -> SeedState:
    """The state after those events that the lifecycle allows."""
    for event in events:
        try:
            state = apply_event(state, event)
        except SeedLifecycleError:
            continue
    return state


def lived(events: Iterable[Event]) -> SeedState:
    return fold_legal(init_seeds(len(SITES), SEEDS), sorted(events, key=lambda e: e.step))


def state_of(*stories: tuple[int, int, str, int]) -> SeedState:
    """The state in which each (layer, seed, story, slot) was lived, and nothing else."""
    return lived(event for place in stories for event in told(*place))


@st.composite
def pasts(draw: st.DrawFn) -> list[Event]:
    """A story for each seed, and then some random events; for `lived`."""
    stories = st.sampled_from(sorted(STORIES))
    slots = {layer: st.sampled_from(FITTING[layer]) for layer in FITTING}
    places = [(layer, seed) for layer in FITTING for seed in range(SEEDS)]
    events = [e for i, j in places for e in told(i, j, draw(stories), draw(slots[i]))]
    for _ in range(draw(st.integers(0, 6))):
        layer, seed = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(sorted(K)))
        chosen = float(draw(slots[layer])) if kind is K.LOAD else draw(st.sampled_from([0.0, 1.0]))
        events.append(Event(NOW, layer, seed, kind, value=chosen, span=3))
    return events


def stacked(trees: Iterable[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def member(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)


def planned(state: SeedState, kernels: Any = KERNELS, **options: Any) -> Any:
    """The plan of a state, and its live part."""
    own = plan(state, kernels, SITES, **options)
    return own, gather(state, kernels, own)


def scattered(bank: Bank, state: SeedState, own: Iterable[Any]) -> Any:
    """Trees like kernels' parameters, in plan order, summed into their places in a bank's."""
    rows = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), bank.params)
    code = np.asarray(bank.code)
    for (layer, seed), tree in zip(running_seeds(state), own, strict=True):
        slot = int(state.slot[layer, seed])
        for into, leaf in zip(
            jax.tree.leaves(rows[code[slot]]), jax.tree.leaves(tree), strict=True
        ):
            into[slot] += np.asarray(leaf)
    return rows

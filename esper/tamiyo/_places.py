"""Where seeds are, and what may be asked of them."""

import numpy as np

from esper.tamiyo._controller import Action, Decision, Observation
from esper_functional import FAILURES_TO_RECOVERY, SeedLifecycleState, kernel_id_words

Place = tuple[int, int]
"""(layer row, seed)."""

NEEDED_STAGE: dict[Action, SeedLifecycleState] = {
    Action.GRAFT: SeedLifecycleState.DORMANT,
    Action.FOSSILIZE: SeedLifecycleState.ACTIVE,
    Action.UNLOAD: SeedLifecycleState.ACTIVE,
    Action.RETARGET: SeedLifecycleState.ACTIVE,
    Action.RESET: SeedLifecycleState.ERROR_RECOVERY,
}
"""The stage that a seed must be in for an action to be legal."""


def seeds_in(observation: Observation, *stages: SeedLifecycleState) -> list[Place]:
    """The seeds in one of `stages`, by row and seed."""
    at = np.asarray(observation.seeds.stage)
    found = np.logical_or.reduce([at == int(stage) for stage in stages])
    rows, seeds = (places.tolist() for places in np.nonzero(found))
    return list(zip(rows, seeds, strict=True))


def free_seeds(observation: Observation) -> dict[int, int]:
    """The first DORMANT seed of every layer that may grow and has kernels to choose from.

    Layers without a free seed are not in it; the order of preference is kept.
    """
    dormant = np.asarray(observation.seeds.stage) == SeedLifecycleState.DORMANT
    some, first = dormant.any(axis=1).tolist(), dormant.argmax(axis=1).tolist()
    return {
        layer: first[layer]
        for layer, candidates in observation.candidates.items()
        if some[layer] and candidates
    }


def holds(observation: Observation, place: Place, kernel_id: str) -> bool:
    """Whether the seed holds, or awaits, that kernel."""
    words = tuple(int(word) for word in np.asarray(observation.seeds.kernel_id)[place])
    return words == kernel_id_words(kernel_id)


def resets(observation: Observation) -> list[Decision]:
    """Empty every seed in ERROR_RECOVERY."""
    decisions: list[Decision] = []
    for layer, seed in seeds_in(observation, SeedLifecycleState.ERROR_RECOVERY):
        failures = int(observation.seeds.error_count[layer, seed])
        reason = (
            f"its output was not finite {failures} times in a row"
            if failures >= FAILURES_TO_RECOVERY
            else "its kernel could not be loaded"
        )
        decisions.append(Decision(Action.RESET, layer, seed, reason))
    return decisions

"""Random numbers of a host that draws any: a function of seed and step, and of nothing else."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
"""What nothing happens within; made once, for steps that need no more."""


@contextlib.contextmanager
def random_stream(device: torch.device, *words: int) -> Iterator[None]:
    """Draw what is drawn within from generators seeded by `words`; outside they are untouched.

    So nothing of the random state has to be kept: a step that is trained again draws the same.
    """
    cards = [torch.cuda.current_device()] if device.type == "cuda" else []
    number = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(cards):
        # Each by itself: `torch.manual_seed` would seed cards that nobody takes back.
        torch.default_generator.manual_seed(number)
        for card in cards:
            torch.cuda.default_generators[card].manual_seed(number)
        yield


def random_states(device: torch.device) -> tuple[bytes, ...]:
    """What the generators that a host can draw from are at."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)

"""Batches of examples that are augmented or lie on disk, by grain.

grain's data sets are functions of an index: the batch of a step, its order and its random
numbers with it, is had without those before it, and a run that goes on needs no state but
its step. (A stateful loader, as torchdata has it, keeps a state that only going through the
steps can bring about.)
"""

import threading
from typing import Any

import grain
import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._loader import Augment, Batch, checked_step
from esper.tolaria.tasks._task import Split

_AHEAD = 4
"""Batches made ready while steps are asked for one after another."""


class _Examples:
    """A part, as grain asks for it."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
        # A copy: what is augmented in place must not reach the data.
        return np.array(self._split.x[index]), self._split.y[index]


class StreamLoader:
    """Batches of arrays.

    Each epoch is a permutation of its own, and an example's random numbers follow from seed,
    epoch and place alone; a last, short batch is left out. Steps that are asked for one after
    another are made ready ahead, by threads; any other is made when it is asked for.

    Args:
        split: the training part.
        batch_size: examples of a step, over all shards.
        seed: of order and augmentation.
        shard: `(k, n)` takes every n-th example of a batch, from the k-th on.
        augment: changes each example each time it is used.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        shard: tuple[int, int],
        augment: Augment | None,
    ) -> None:
        first, every = shard
        used = len(split) // batch_size * batch_size
        examples = grain.MapDataset.source(_Examples(split)).seed(seed).shuffle()[:used]
        if augment is not None:
            examples = examples.random_map(_checking(augment))
        # After the augmentation, so that an example's random numbers do not depend on shards.
        share = examples[first::every]
        self._batches = share.batch(batch_size // every, drop_remainder=True).repeat()
        self._lock = threading.Lock()
        self._next: int | None = None
        self._ahead: Any = None

    def batch(self, step: int) -> Batch:
        """Arrays of a step, `[batch / n, *example]` and `[batch / n, *labels]`.

        Raises:
            InputError: where the augmentation gives another shape or dtype.
        """
        checked_step(step)
        with self._lock:
            follows, self._next = step == self._next, None
            if follows:
                if self._ahead is None:
                    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_AHEAD)
                    self._ahead = iter(self._batches.to_iter_dataset(options))
                    self._ahead.set_state({"next_index": step})
                batch: Any = next(self._ahead)
            else:
                self._ahead = None
                batch = self._batches[step]
            self._next = step + 1
        return Batch(*batch)


def _checking(augment: Augment) -> Any:
    def augmented(
        example: tuple[np.ndarray, np.ndarray], random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        x, y = example
        shape, dtype = x.shape, x.dtype
        changed = augment(x, random)
        if not isinstance(changed, np.ndarray) or (changed.shape, changed.dtype) != (shape, dtype):
            got = (
                f"{changed.dtype}{list(changed.shape)}"
                if isinstance(changed, np.ndarray)
                else type(changed).__name__
            )
            raise InputError(
                f"the augmentation gave {got} for an example of {dtype}{list(shape)}: expected an"
                " array of the same shape and dtype"
            )
        return changed, y

    return augmented

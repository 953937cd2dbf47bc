"""What a step trains on, as a function of the step: a run's data cursor is its step.

Examples in memory are on the device already, so a batch is their indices. Examples
that are changed on the way, or that lie on disk, come as arrays.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._task import Task

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""One example `[*example]` and its random numbers to an example of the same shape and dtype."""


class Batch(NamedTuple):
    """Examples `[batch, *example]` and their labels `[batch, *labels]`."""

    x: np.ndarray
    y: np.ndarray


class Loader(Protocol):
    """Batches of a training part by step."""

    def batch(self, step: int) -> np.ndarray | Batch | None:
        """What a step trains on: the same whenever and wherever it is asked for.

        Returns:
            None for the whole training part; indices into it, `[batch]` i32; or arrays.
        """
        ...


class WholeLoader:
    """The whole training part in every step."""

    def batch(self, step: int) -> None:
        """None, which stands for all examples."""
        return


class IndexLoader:
    """Indices into a training part that is in memory.

    Each epoch is a permutation of its own; a last, short batch is left out.

    Args:
        count: examples of the training part.
        batch_size: examples of a step, over all shards.
        seed: of the permutations.
        shard: `(k, n)` takes every n-th example of a batch, from the k-th on.
    """

    def __init__(self, count: int, batch_size: int, seed: int, shard: tuple[int, int]) -> None:
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._shard = shard
        self._drawn: tuple[int, np.ndarray] | None = None
        """The epoch that was asked for last, and its order."""

    def batch(self, step: int) -> np.ndarray:
        """Indices, `[batch / n]` i32."""
        epoch, place = divmod(checked_step(step), self._count // self._batch_size)
        start = place * self._batch_size
        first, every = self._shard
        drawn = self._drawn
        if drawn is None or drawn[0] != epoch:
            self._drawn = drawn = epoch, _permutation(self._seed, epoch, self._count)
        return drawn[1][start + first : start + self._batch_size : every]


class ShareLoader:
    """The same share of the training part in every step: the whole of it, over n shards."""

    def __init__(self, count: int, shard: tuple[int, int]) -> None:
        self._indices = np.arange(shard[0], count, shard[1], dtype=np.int32)
        self._indices.flags.writeable = False

    def batch(self, step: int) -> np.ndarray:
        """Indices, `[examples / n]` i32."""
        return self._indices


def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """An epoch's order, `[count]` i32."""
    order = np.random.default_rng([seed, 1, epoch]).permutation(count).astype(np.int32)
    order.flags.writeable = False
    return order


def checked_step(step: int) -> int:
    """The step.

    Raises:
        InputError: for one before the first.
    """
    if step < 0:
        raise InputError(f"there is no step {step}: expected 0 or more")
    return step


def make_loader(
    task: Task,
    *,
    batch_size: int | None,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    augment: Augment | None = None,
) -> Loader:
    """The batches of a task's training part.

    Shards divide each batch: `batch_size` is that of all of them together, and what n shards
    get in a step is what one process would get. So a run over n processes that average their
    gradients is the run of one.

    Args:
        batch_size: examples of a step; None takes the whole training part.
        seed: of the order, and of augmentation.
        shard: `(k, n)`, this process's number from 0 and how many there are.
        augment: changes each example each time it is used, with random numbers of its own;
            such as `crop_and_flip`.

    Raises:
        InputError: for a batch larger than the training part, shards that do not divide it, or
            an augmentation of what is never put together in batches; where grain is needed
            and not installed.
    """
    count = len(task.train)
    _check_shard(task, batch_size, shard)
    if batch_size is not None and not 1 <= batch_size <= count:
        raise InputError(
            f"batch_size is {batch_size}, and the training part of {task.name} has"
            f" {count} examples: expected 1 to {count}, or None for all of them"
        )
    if augment is None and not task.train.streamed:
        if batch_size is not None:
            return IndexLoader(count, batch_size, seed, shard)
        return WholeLoader() if shard[1] == 1 else ShareLoader(count, shard)
    if batch_size is None:
        what = "augmented" if augment is not None else "read from disk"
        raise InputError(
            f"the training part of {task.name} is {what}, and batch_size is None, which takes all"
            f" of its {count} examples in every step: give a batch_size"
        )
    try:
        from esper.tolaria.tasks._stream import StreamLoader
    except ModuleNotFoundError as error:
        raise InputError(
            f"batches of {task.name} that are augmented or lie on disk are put together by"
            f" {error.name}, which is not installed: pip install 'esper-morphogenetic[data]'"
        ) from error
    return StreamLoader(task.train, batch_size, seed, shard, augment)


def _check_shard(task: Task, batch_size: int | None, shard: tuple[int, int]) -> None:
    first, every = shard
    if not 0 <= first < every:
        raise InputError(
            f"shard is {tuple(shard)}: expected (k, n), the number of this process, 0 to n - 1,"
            " and how many there are"
        )
    shared = len(task.train) if batch_size is None else batch_size
    if shared % every:
        what = f"the training part of {task.name} has" if batch_size is None else "batch_size is"
        raise InputError(
            f"{what} {shared}, which {every} shards cannot divide evenly: expected a multiple of"
            f" {every}, so that the mean of the shards' gradients is that of the batch"
        )


def batch_indices(task: Task, batch_size: int | None, seed: int, step: int) -> np.ndarray | None:
    """The examples of one step, `[batch]` i32; None for all of them.

    Raises:
        InputError: see `make_loader`.
    """
    batch = make_loader(task, batch_size=batch_size, seed=seed).batch(step)
    if isinstance(batch, Batch):
        raise InputError(
            f"the training part of {task.name} is read from disk, so a step's examples have no"
            " indices in memory: take make_loader(...).batch(step)"
        )
    return batch

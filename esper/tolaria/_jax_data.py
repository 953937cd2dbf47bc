"""The examples of a task as arrays: on the device, or in a mapped file, read as needed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from esper.errors import InputError
from esper.tolaria._trainee import Batch
from esper.tolaria.tasks import Split, Task

STREAMED_CHUNK = 1024
"""Examples of a mapped file that are judged at a time, where nobody chose how many."""


class StepExamples(NamedTuple):
    """What a step is given: examples, or a whole part and which of it."""

    x: Any
    y: Any
    indices: np.ndarray | None

    @property
    def shapes(self) -> tuple[Any, ...]:
        """By which a program is chosen."""
        return self.x.shape, self.y.shape, None if self.indices is None else self.indices.shape

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.y if self.indices is None else self.indices)


class JaxData:
    """A task's parts.

    Args:
        chunk: most examples of one forward pass without gradients; None for a whole part, but
            `STREAMED_CHUNK` of one that is streamed.
    """

    def __init__(self, task: Task, chunk: int | None) -> None:
        self._name = task.name
        self._chunk = chunk
        self._splits: dict[str, Split] = task.splits
        self._held = {
            name: (jnp.asarray(split.x), jnp.asarray(split.y))
            for name, split in task.splits.items()
            if not split.streamed
        }

    def held(self, split: str) -> bool:
        """Whether a part lies on the device."""
        return split in self._held

    def count(self, split: str) -> int:
        """How many examples a part has.

        Raises:
            InputError: for a part that the task does not have.
        """
        if split not in self._splits:
            raise InputError(
                f"the task {self._name} has no part {split!r}: expected one of"
                f" {', '.join(self._splits)}"
            )
        return len(self._splits[split])

    def chunk_size(self, split: str, copies: int = 1) -> int:
        """Examples of one forward pass over a part, each of them in so many copies."""
        streamed = STREAMED_CHUNK if split not in self._held else None
        most = streamed if self._chunk is None else self._chunk
        count = self.count(split)
        return count if most is None else min(count, max(1, most // copies))

    def step(self, batch: np.ndarray | Batch | None) -> StepExamples:
        """The examples of one step; of a mapped file a copy of the rows alone."""
        if isinstance(batch, Batch):
            return StepExamples(batch.x, batch.y, None)
        held = self._held.get("train")
        if held is not None:
            return StepExamples(*held, batch)
        return StepExamples(*self.rows(batch), None)

    def rows(self, indices: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Training examples and their labels, in numpy; None for all."""
        split = self._splits["train"]
        own = slice(None) if indices is None else indices
        return np.array(split.x[own]), np.array(split.y[own])

    def chunks(self, split: str, size: int) -> Iterator[tuple[Any, Any]]:
        """A part's examples in order, at most `size` at a time."""
        count, held = self.count(split), self._held.get(split)
        if held is not None and size >= count:
            yield held
            return
        for begin in range(0, count, size):
            own = slice(begin, begin + size)
            if held is not None:
                yield held[0][own], held[1][own]
            else:
                source = self._splits[split]
                yield np.array(source.x[own]), np.array(source.y[own])

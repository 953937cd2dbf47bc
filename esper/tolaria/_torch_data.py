"""The examples of a task as tensors, and its loss."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esper.errors import InputError
from esper.tolaria._trainee import Batch

if TYPE_CHECKING:
    from esper.tolaria.tasks import Split, Task


class Examples(NamedTuple):
    """Inputs `[n, *example]` and their labels `[n, *labels]`: classes i64, or values f32."""

    x: Tensor
    y: Tensor


class Objective:
    """A task's loss, of outputs whose last axis are classes or values.

    Args:
        kind: "cross_entropy", the mean over all labels, or "mean_squared_error", over all values.
    """

    def __init__(self, kind: str) -> None:
        self.classifies = kind == "cross_entropy"

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean loss, computed in float32."""
        if outputs.dtype is not torch.float32:  # asking takes less than converting what is
            outputs = outputs.float()
        if self.classifies:
            return F.cross_entropy(*_rows(outputs, y))
        return F.mse_loss(_like(outputs, y), y)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of each example, `[n]` f32, a mean over the example's own labels."""
        if self.classifies:
            own = F.cross_entropy(*_rows(outputs.float(), y), reduction="none")
        else:
            own = F.mse_loss(_like(outputs.float(), y), y, reduction="none")
        return own.reshape(len(y), -1).mean(1)

    def accuracy(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The share of labels that are right; NaN for regression."""
        if not self.classifies:
            return torch.tensor(torch.nan, device=outputs.device)
        return (outputs.argmax(-1) == y).float().mean()

    def predictions(self, outputs: Tensor) -> Tensor:
        """Class probabilities, or the values as they are."""
        return torch.softmax(outputs.float(), -1) if self.classifies else outputs.float()


def _rows(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.dim() == 2:
        return outputs, y
    return outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1)


def _like(outputs: Tensor, y: Tensor) -> Tensor:
    """Outputs of one value an example may have an axis for it that labels lack."""
    return outputs if outputs.shape == y.shape else outputs.reshape(y.shape)


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor of the same memory, or of a copy where that may not be written to."""
    plain = np.ascontiguousarray(array)
    return torch.from_numpy(plain if plain.flags.writeable else plain.copy())


class TaskData:
    """A task's parts: on the device, or in a mapped file from which they are read by chunks."""

    def __init__(self, task: "Task", device: torch.device) -> None:
        self._device = device
        self._name = task.name
        self._splits: dict[str, Split] = task.splits
        self._held = {
            name: self._examples(split.x, split.y)
            for name, split in task.splits.items()
            if not isinstance(split.x, np.memmap)
        }

    def _examples(self, x: np.ndarray, y: np.ndarray) -> Examples:
        labels = _tensor(y).to(self._device)
        if not labels.is_floating_point():
            labels = labels.long()
        return Examples(self.inputs(x), labels)

    def inputs(self, x: np.ndarray) -> Tensor:
        """Inputs on the device."""
        return _tensor(x).to(self._device)

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

    def batch(self, batch: np.ndarray | Batch | None) -> Examples:
        """The examples of one step: by their indices `[n]` i32, as they are, or all."""
        if isinstance(batch, tuple):
            return self._examples(*batch)
        held = self._held.get("train")
        if held is None:
            split = self._splits["train"]
            own = slice(None) if batch is None else batch
            return self._examples(split.x[own], split.y[own])
        if batch is None:
            return held
        # Loaders' indices may not be written to, so they are copied in any case.
        chosen = torch.from_numpy(batch.copy())
        if self._device.type != "cpu":
            chosen = chosen.to(self._device)
        return Examples(held.x[chosen], held.y[chosen])

    def chunks(self, split: str, size: int | None) -> Iterator[Examples]:
        """A part's examples in order, at most `size` at a time."""
        count, held = self.count(split), self._held.get(split)
        size = count if size is None else size
        for begin in range(0, count, size):
            own = slice(begin, begin + size)
            if held is not None:
                yield Examples(held.x[own], held.y[own])
            else:
                source = self._splits[split]
                yield self._examples(source.x[own], source.y[own])

"""What a network is trained on: data in three parts, a host, and a loss."""

import dataclasses
import hashlib
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._host import Host
from esper.tolaria.tasks._mlp_host import MLPHost

Loss = Literal["cross_entropy", "mean_squared_error"]
LOSSES: tuple[str, ...] = get_args(Loss)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Examples and their labels.

    Attributes:
        x: `[n, *example]`, f32, or i32 for tokens.
        y: `[n, *labels]`, i32 for classes, f32 for regression.
    """

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    @property
    def streamed(self) -> bool:
        """Whether the examples lie in a mapped file, and not in memory.

        A loader reads such a part batch by batch; nobody should copy it to a device whole.
        """
        return isinstance(self.x, np.memmap)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Data in three parts, the host to grow, and the loss.

    The validation part is what controllers judge by; the test part is reported and
    decides nothing.

    Attributes:
        name: as `load_task` takes it, or a user's own.
        loss: "cross_entropy", the mean over all labels, or "mean_squared_error", the mean
            over all values.
        best_loss: the loss that no model can be below on average over new data, where it is
            known exactly; in the unit of the loss.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    host: Host
    loss: Loss = "cross_entropy"
    best_loss: float | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """The parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def host_sizes(self) -> tuple[int, ...]:
        """The layer sizes of an MLP host, input first.

        Raises:
            InputError: where the host is another one.
        """
        if not isinstance(self.host, MLPHost):
            raise InputError(
                f"the host of {self.name} is {self.host.name!r}, which has no layer sizes: expected"
                " an MLPHost; take `task.host` instead of `task.host_sizes`"
            )
        return self.host.sizes

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the arrays with their names, dtypes and shapes, as 64 hex digits."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for role, array in (("x", split.x), ("y", split.y)):
                digest.update(f"{name}.{role} {array.dtype.str} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).data.cast("B"))
        return digest.hexdigest()

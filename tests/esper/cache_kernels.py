"""Many real kernels, made of one that was compiled, and libraries that are there or not."""

import dataclasses
import threading

import numpy as np

from esper.artifacts import Artifact, rewrite_artifact
from esper.errors import KernelNotFoundError, LibraryError


def variant(artifact: Artifact, number: int, *, padding: int = 0, torch: bool = True) -> Artifact:
    """The same programs with other parameters; `padding` makes the file so much longer."""
    random = np.random.default_rng(number)
    return rewrite_artifact(
        artifact,
        # Space at its end changes nothing that a blueprint says.
        blueprint=artifact.blueprint + b" " * padding,
        init_seed=number,
        params={
            name: random.standard_normal(p.shape).astype(p.dtype)
            for name, p in artifact.params.items()
        },
        torchscript=artifact.torchscript if torch else None,
    )


def held_bytes(artifact: Artifact) -> int:
    """All bytes that an artifact's fields hold, whichever fields there are."""
    total = 0
    for field in dataclasses.fields(artifact):
        value = getattr(artifact, field.name)
        if isinstance(value, bytes):
            total += len(value)
        elif field.name == "params":
            total += sum(p.nbytes for p in value.values())
    return total


class Shelf:
    """A source in memory: kernels by id, each ask counted; `down` is raised where it is set.

    Where `gate` is set, an ask waits for it, and `asked` tells that one has come.
    """

    def __init__(self, *artifacts: Artifact) -> None:
        self.kernels = {artifact.kernel_id: artifact for artifact in artifacts}
        self.asks: list[str] = []
        self.down: Exception | None = None
        self.gate: threading.Event | None = None
        self.asked = threading.Event()
        self._lock = threading.Lock()

    def get(self, kernel_id: str) -> Artifact:
        with self._lock:
            self.asks.append(kernel_id)
        self.asked.set()
        if self.gate is not None:
            assert self.gate.wait(30)
        if self.down is not None:
            raise self.down
        if kernel_id not in self.kernels:
            raise KernelNotFoundError(f"no kernel {kernel_id[:12]}")
        return self.kernels[kernel_id]


DOWN = LibraryError("the database is locked")

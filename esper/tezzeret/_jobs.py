"""What is to be compiled, and what became of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from esper.artifacts import Artifact
from esper.contracts import KernelSignature
from esper.errors import EsperError
from esper.tezzeret._blueprint import BlueprintIR


@dataclasses.dataclass(frozen=True)
class CompileJob:
    """A blueprint, and what it is to be compiled for; see `compile_blueprint`."""

    blueprint: BlueprintIR
    signature: KernelSignature
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    init_seed: int = 0
    ancestor: str | None = None

    def __str__(self) -> str:
        """For example `gated 64->10 float32, seed 3`."""
        return f"{self.blueprint.name} {self.signature}, seed {self.init_seed}"


@dataclasses.dataclass(frozen=True)
class CompileLimits:
    """What a worker may use: time for each job, and memory for all that it holds.

    A worker goes on with the next job, and keeps some of what earlier ones left in its memory: a
    job may fail for memory in a worker that has done many, and not in a fresh one.

    Raises:
        ValueError: for a limit that is not positive, or less memory than any job needs.
    """

    wall_seconds: float = 120.0
    """Of one job. Its worker is then killed from outside."""
    cpu_seconds: int = 240
    """Processor time of one job, over all threads."""
    memory_bytes: int = 8 << 30
    """Address space of a worker beyond what its imports take; jax and torch need 1.5 GiB of it for
    the smallest kernel. Enforced on Linux."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"the limit {field.name} must be positive, got {value!r}")
        if self.memory_bytes < 3 << 29:
            raise ValueError(
                f"the limit memory_bytes must be at least 1.5 GiB, which jax and torch need, got"
                f" {self.memory_bytes}"
            )


@dataclasses.dataclass(frozen=True)
class CompileOutcome:
    """What became of a job: an artifact or an error; both where it could not be measured."""

    job: CompileJob
    artifact: Artifact | None = None
    error: EsperError | None = None
    attempts: int = 1
    """How many workers were given the job; more than one where a worker died."""
    seconds: float = 0.0
    """Wall time in the worker that finished it."""
    measurements: tuple[Mapping[str, Any], ...] = ()
    """Of each backend, where asked for; see `esper.execution.KernelMeasurement`."""
    worker: int | None = None
    """Process id of the worker that finished it; None where none did."""
    died: bool = False
    """Whether no worker lived to finish it, for a reason that is none of its limits."""
    cancelled: bool = False
    """Whether it was given up before it was done."""

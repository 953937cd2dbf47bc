"""What is told of blueprints and kernels when they change."""

from typing import Literal, Self

from pydantic import model_validator

from esper.contracts._data import Count, Data, Name, Reason, Seconds, Sha256
from esper.contracts._signature import SignatureText
from esper.contracts._states import BlueprintState, KernelState


class BlueprintChanged(Data):
    """A blueprint was submitted, or went from one state to another."""

    schema_version: Literal[1] = 1
    blueprint_id: Sha256
    name: Name
    before: BlueprintState | None
    """None where it was submitted."""
    after: BlueprintState
    worker: Name = ""
    """Who claims or claimed it, where that is what changed."""
    attempt: Count = 0
    kernel_id: Sha256 | None = None
    """What it was compiled to."""
    reason: Reason = ""
    at: Seconds


class KernelChanged(Data):
    """A kernel was put or removed, or went from one state to another."""

    schema_version: Literal[1] = 1
    kernel_id: Sha256
    blueprint: Name
    signature: SignatureText
    before: KernelState | None
    """None where it was put."""
    after: KernelState | None
    """None where it was removed."""
    reason: Reason = ""
    at: Seconds

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        if self.before is None and self.after is None:
            raise ValueError("a kernel that changed was there before, or is there now, or both")
        return self

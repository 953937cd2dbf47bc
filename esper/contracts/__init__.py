"""What crosses a seam, as strict data: unknown keys are refused, bounds are checked.

Importing this needs neither torch nor jax.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from esper.contracts._kernel_metadata import KernelMetadata as KernelMetadata

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=1 << 20)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KernelSignature(_Data):
    """What a kernel takes and gives: shapes of one example, and their dtype."""

    input_shape: tuple[Size, ...]
    output_shape: tuple[Size, ...]
    dtype: Literal["float32"] = "float32"

    def __str__(self) -> str:
        """For example `2->8 float32`."""
        sides = ("x".join(map(str, s)) for s in (self.input_shape, self.output_shape))
        return f"{'->'.join(sides)} {self.dtype}"


class TensorSpec(_Data):
    """Name, shape and dtype of a parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Manifest(_Data):
    """What an artifact says of itself (schema version 1)."""

    schema_version: Literal[1] = 1
    blueprint: str
    recipe: Sha256
    """SHA-256 of all that it was compiled from; equal recipes give equal artifacts."""
    signature: KernelSignature
    sizes: dict[str, int]
    birth: Literal["zero", "free"]
    confidence: float = Field(ge=0.0, le=1.0)
    init_seed: int
    parameters: tuple[TensorSpec, ...]
    """In the order of the TorchScript arguments."""
    digests: dict[str, Sha256]
    """SHA-256 of every other member."""
    versions: dict[str, str]
    """Libraries that compiled it."""

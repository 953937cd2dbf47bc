"""What an artifact says of itself."""

from typing import Literal

from pydantic import Field

from esper.contracts._data import Data, Name, Sha256
from esper.contracts._signature import KernelSignature


class TensorSpec(Data):
    """Name, shape and dtype of a parameter."""

    name: Name
    shape: tuple[int, ...]
    dtype: str


class Manifest(Data):
    """What an artifact says of itself (schema version 2, which adds what has a default here)."""

    schema_version: Literal[1, 2] = 2
    blueprint: Name
    """Its name; for a user's own kernel, that of the module or function it was made of."""
    origin: Literal["blueprint", "module", "function"] = "blueprint"
    """What it was compiled from; only of a blueprint the artifact holds the source."""
    recipe: Sha256
    """SHA-256 of all that it was compiled from; equal recipes give equal artifacts."""
    signature: KernelSignature
    sizes: dict[Name, int]
    birth: Literal["zero", "identity", "free"]
    confidence: float = Field(ge=0.0, le=1.0)
    init_seed: int
    parameters: tuple[TensorSpec, ...]
    """In the order of the TorchScript arguments."""
    digests: dict[str, Sha256]
    """SHA-256 of every other member."""
    vjp_order: int = Field(default=1, ge=1, le=2)
    """How often its StableHLO program can be differentiated in reverse."""
    ancestor: Sha256 | None = None
    """The artifact whose blueprint it was compiled from anew, because libraries had moved on."""
    versions: dict[Name, Name]
    """Libraries that compiled it."""

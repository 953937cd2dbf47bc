"""What crosses a seam, as strict data: unknown keys are refused, bounds are checked.

Importing this needs neither torch nor jax.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from esper.contracts._kernel_metadata import KernelMetadata as KernelMetadata

Name = Annotated[str, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]
"""Without control characters, which would steer the terminal that shows it."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LARGEST_SIZE = 1 << 20
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KernelSignature(_Data):
    """What a kernel takes and gives: shapes of one example, and their dtype."""

    input_shape: tuple[Size, ...]
    output_shape: tuple[Size, ...]
    dtype: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def parse(cls, text: str) -> "KernelSignature":
        """Read what `str` writes: `2->8 float32`, or `3x32x32->8x16x16`, which is float32.

        Raises:
            ValueError: saying what was expected.
        """
        found = re.fullmatch(
            r"\s*(\d+(?:x\d+)*)\s*->\s*(\d+(?:x\d+)*)(?:\s+(float32|bfloat16))?\s*", text
        )
        if found is None:
            raise ValueError(
                f"{text!r} is no signature: expected the shapes of one example and their dtype,"
                " such as '64->10', '16x64->16x64 bfloat16' or '3x32x32->8x16x16'"
            )
        sides = [tuple(map(int, side.split("x"))) for side in found.group(1, 2)]
        for size in (size for side in sides for size in side):
            if not 1 <= size <= LARGEST_SIZE:
                raise ValueError(
                    f"{text!r} is no signature: sizes are from 1 to {LARGEST_SIZE}, got {size}"
                )
        dtype = "bfloat16" if found.group(3) == "bfloat16" else "float32"
        return cls(input_shape=sides[0], output_shape=sides[1], dtype=dtype)

    def __str__(self) -> str:
        """For example `2->8 float32`."""
        sides = ("x".join(map(str, s)) for s in (self.input_shape, self.output_shape))
        return f"{'->'.join(sides)} {self.dtype}"


class TensorSpec(_Data):
    """Name, shape and dtype of a parameter."""

    name: Name
    shape: tuple[int, ...]
    dtype: str


class Manifest(_Data):
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

"""What a kernel takes and gives."""

import re
from typing import Annotated, Literal

from pydantic import Field

from esper.contracts._data import LARGEST_SIZE, Data, Size

SignatureText = Annotated[
    str, Field(pattern=r"^[0-9]+(x[0-9]+)*->[0-9]+(x[0-9]+)* (float32|bfloat16)$", max_length=200)
]
"""As `str(KernelSignature)`."""
Shape = Annotated[tuple[Size, ...], Field(min_length=1)]


class KernelSignature(Data):
    """What a kernel takes and gives: shapes of one example, and their dtype."""

    input_shape: Shape
    output_shape: Shape
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

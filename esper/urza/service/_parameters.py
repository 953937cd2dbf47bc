"""Parts of addresses: ids and parameters that several endpoints take."""

from typing import Annotated

from fastapi import Path, Query

from esper.contracts import KernelSignature
from esper.errors import InputError

IdInPath = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits")]
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
RunId = Annotated[str, Query(min_length=1, max_length=200, pattern=PRINTABLE)]
Text = Annotated[str | None, Query(max_length=200, pattern=PRINTABLE)]
Digest = Annotated[str | None, Query(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[int | None, Query(ge=0, le=(1 << 63) - 1)]
Limit = Annotated[int, Query(ge=1, le=1000)]
CursorText = Annotated[str | None, Query(min_length=1, max_length=1000, pattern=r"^[!-~]*$")]
TagTexts = Annotated[list[str] | None, Query(max_length=64)]
SignatureText = Annotated[
    str | None, Query(max_length=200, description="such as `2->8 float32`, or `2->8`")
]


def signature_of(text: str | None) -> KernelSignature | None:
    """A signature by its text.

    Raises:
        InputError: for a text that is none.
    """
    try:
        return None if text is None else KernelSignature.parse(text)
    except ValueError as error:
        raise InputError(f"the parameter signature: {error}") from error

"""What all contracts are made of: a strict base, and the types that several of them share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Data(BaseModel):
    """Frozen, strict data: no key is unknown, `false` is no number, and no number is NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


LARGEST_SIZE = 1 << 20
LARGEST_COUNT = (1 << 63) - 1
"""What a database takes in a column of whole numbers."""
LONGEST_REASON = 2_000

Name = Annotated[str, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]
"""Without control characters, which would steer the terminal that shows it."""
Label = Annotated[Name, Field(min_length=1, max_length=200)]
"""A name that is stored: of a blueprint, a worker, a run, a task."""
Tag = Annotated[Name, Field(min_length=1, max_length=64)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Token = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""As `uuid.uuid4().hex`."""
Reason = Annotated[str, Field(max_length=LONGEST_REASON, pattern=r"^[^\x00]*$")]
"""Why something is as it is, in words; `reason_text` makes one of any text."""
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(ge=0.0)]
"""A time, in seconds since 1970 where it is a moment."""


def reason_text(text: str) -> str:
    """A text as a `Reason`: without what databases refuse, and shortened in the middle."""
    kept = text.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")
    if len(kept) <= LONGEST_REASON:
        return kept
    half = LONGEST_REASON // 2
    return f"{kept[: half - 2]} … {kept[len(kept) - half + 1 :]}"

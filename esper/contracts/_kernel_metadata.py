"""What is known of a kernel without its artifact at hand."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class KernelMetadata(BaseModel):
    """A kernel's shapes, its costs, where it runs, and what was measured of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kernel_id: str
    blueprint: str
    birth: Literal["zero", "identity", "free"]
    confidence: float = Field(ge=0.0, le=1.0)
    input_shape: tuple[int, ...]
    """Of one example."""
    output_shape: tuple[int, ...]
    """Of one example."""
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    parameter_count: int = Field(ge=0)
    parameter_bytes: int = Field(ge=0)
    flops: int | None = Field(default=None, ge=0)
    """Floating-point operations per example, forward; None where its blueprint does not tell."""
    size_bytes: int = Field(ge=0)
    """Of the artifact's file."""
    platforms: tuple[str, ...] | None = None
    """Where its StableHLO runs, such as `("cpu", "cuda")`; None before the artifact was seen."""
    has_torchscript: bool | None = None
    """Whether torch runs it without jax, on any device; None before the artifact was seen."""
    performance: float | None = Field(default=None, ge=0.0, le=1.0)
    """The score that was reported last; None where none was."""
    accesses: int = Field(default=0, ge=0)
    """How often it was asked for."""
    failures: int = Field(default=0, ge=0)
    """How often it was reported to fail."""
    last_access: int = Field(default=0, ge=0)
    """Which ask of the cache was the last for it, counted from 1; 0 where there was none."""

    def memory_bytes(self, batch_size: int = 1) -> int:
        """Bytes that it needs on a device: its parameters, and a batch's input and output.

        What its program holds in between is not known, and not counted.
        """
        elements = 0
        for shape in (self.input_shape, self.output_shape):
            size = 1
            for axis in shape:
                size *= axis
            elements += size
        return self.parameter_bytes + batch_size * elements * _ELEMENT_BYTES[self.dtype]

    @property
    def memory_footprint_mb(self) -> float:
        """`memory_bytes` of one example, in MB of 2²⁰ bytes."""
        return self.memory_bytes() / (1 << 20)

    @property
    def performance_profile(self) -> dict[str, float]:
        """The measured score, 0.0 where there is none, and the confidence at birth."""
        return {"score": self.performance or 0.0, "confidence": self.confidence}

    @property
    def device_requirements(self) -> tuple[str, ...]:
        """The platforms of which it needs one; none where any will do, or it is not known."""
        return () if self.has_torchscript else self.platforms or ()

    def is_compatible_with_shape(self, shape: Sequence[int]) -> bool:
        """Whether one example of this shape is what it takes."""
        return tuple(shape) == self.input_shape

    def runs_on(self, platform: str, backend: Literal["jax", "torch"] | None = None) -> bool:
        """Whether it has a program for a platform such as `cuda`; what is not known is allowed.

        Args:
            backend: who is to run it; by default whoever can.
        """
        if backend != "jax" and self.has_torchscript is not False:
            return True
        return self.platforms is None or platform in self.platforms

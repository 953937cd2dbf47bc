"""What every kernel promises at birth, checked before it becomes an artifact."""

from typing import Any, Literal

import numpy as np

from esper.errors import KernelCompilationError
from esper.tezzeret._parity import BATCHES, Checked, run_jax
from esper.tezzeret._programs import array_dtype

Birth = Literal["zero", "identity", "free"]


def check_birth(kernel: Checked, program: Any, params: dict[str, np.ndarray], birth: Birth) -> None:
    """Check a kernel's claims with its parameters at birth.

    Its output has the signature's shape; it is finite; it is exactly zero, or
    exactly the input, where the blueprint claims so, and not zero where it does
    not; and the first gradient is not zero everywhere, for a kernel born dead
    would never learn.

    Raises:
        KernelCompilationError: for a claim that does not hold.
    """
    random = np.random.default_rng(1)
    dtype = array_dtype(kernel.signature.dtype)
    batch = BATCHES[-1]
    x = random.standard_normal((batch, *kernel.signature.input_shape)).astype(dtype)
    cotangent = random.standard_normal((batch, *kernel.signature.output_shape)).astype(dtype)
    seen = run_jax(program, params, x, cotangent)
    output = seen["output"]
    if output.shape != cotangent.shape:
        raise KernelCompilationError(
            f"its output has shape {output.shape[1:]}, the signature says"
            f" {kernel.signature.output_shape}"
        )
    if not np.isfinite(output).all():
        raise KernelCompilationError("its output at birth is not finite")
    if birth == "zero" and output.any():
        raise KernelCompilationError(
            "it claims to be born zero, and its output at birth is as large as"
            f" {np.abs(output).max():.3g}: initialise its last layer with zeros, or claim 'free'"
        )
    if birth == "identity" and not np.array_equal(output, x):
        gap = np.abs(output.astype(np.float32) - x.astype(np.float32)).max()
        raise KernelCompilationError(
            f"it claims to be born the identity, and its output at birth differs from its input by"
            f" up to {gap:.3g}: initialise it so, or claim 'free'"
        )
    if birth == "free" and not output.any():
        raise KernelCompilationError(
            "its output at birth is zero everywhere, and it claims 'free': claim 'zero'"
        )
    gradients = [seen[f"gradient of {p.name}"] for p in kernel.parameters]
    if not any(g.any() for g in gradients):
        raise KernelCompilationError(
            "the first gradient of every parameter is zero: it would never learn"
        )
    if not all(np.isfinite(g).all() for g in gradients):
        raise KernelCompilationError("a first gradient is not finite")

"""The gate: both programs of a kernel must compute the same, forward and backward."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from esper.contracts import KernelSignature
from esper.errors import KernelCompilationError
from esper.tensors import from_torch, to_torch
from esper.tezzeret._programs import array_dtype
from esper.tezzeret._resolve import ParameterSpec
from esper_functional import difference

BATCHES = (1, 7)
"""Batch sizes at which the programs are compared."""

DRAWS = 3
"""Sets of random data, on one of which they must agree."""


class Checked(Protocol):
    """What the gates know of a kernel, whatever it was made of."""

    @property
    def signature(self) -> KernelSignature:
        """What it takes and gives."""
        ...

    @property
    def parameters(self) -> Sequence[ParameterSpec]:
        """Their names, shapes and fan-ins."""
        ...


@lru_cache(maxsize=2)
def _outputs_and_gradients(program: Any) -> Any:
    def outputs(params: Any, x: Any, cotangent: Any) -> Any:
        y, pull_back = jax.vjp(program, params, x)
        return y, *pull_back(cotangent)

    return jax.jit(outputs)


def run_jax(
    program: Any, params: dict[str, np.ndarray], x: np.ndarray, cotangent: np.ndarray
) -> dict[str, np.ndarray]:
    """Output and gradients of `program(params, x)`, by name."""
    y, d_params, d_x = _outputs_and_gradients(program)(
        params, jnp.asarray(x), jnp.asarray(cotangent)
    )
    named = {"output": y, "gradient of x": d_x}
    named |= {f"gradient of {name}": d for name, d in d_params.items()}
    return {name: np.asarray(value) for name, value in named.items()}


def run_torch(
    program: Any, params: dict[str, np.ndarray], x: np.ndarray, cotangent: np.ndarray
) -> dict[str, np.ndarray]:
    """Output and gradients of the scripted `program(params..., x)`, by name."""
    import torch

    inputs = {name: to_torch(p).requires_grad_() for name, p in params.items()}
    source = to_torch(x).requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings(), torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
        warnings.simplefilter("ignore", DeprecationWarning)
        y = program(*inputs.values(), source)
        if tuple(y.shape) != cotangent.shape:
            raise KernelCompilationError(
                f"torch gives an output of shape {tuple(y.shape)} at batch {len(x)}, expected"
                f" {cotangent.shape}: x.squeeze() without an axis, for one, takes a batch of 1 away"
                " too"
            )
        y.backward(to_torch(cotangent))
    found = {"output": from_torch(y), "gradient of x": _gradient(source)}
    return found | {f"gradient of {name}": _gradient(p) for name, p in inputs.items()}


def _gradient(tensor: Any) -> np.ndarray:
    # What does not depend on an input has no gradient in torch, and one of zeros in jax.
    return from_torch(tensor.detach() * 0 if tensor.grad is None else tensor.grad)


Runner = Callable[[Any, dict[str, np.ndarray], np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""Runs a program: `run_jax` or `run_torch`."""


def check_parity(
    kernel: Checked,
    jax_program: Any,
    other_program: Any,
    *,
    own: Mapping[str, np.ndarray] | None = None,
    run_other: Runner = run_torch,
) -> None:
    """Compare two programs on random data, parameters at random instead of at birth.

    They may disagree on one set of data and have two more to agree on: rounding can put a value on
    different sides of a kink, a ReLU's or a maximum's, where gradients jump, and a norm's gradient
    is large where its input hardly varies. Programs that are not the same disagree on all of them.

    Args:
        kernel: what it takes, and its parameters.
        jax_program: `program(params, x)`.
        other_program: `program(params..., x)` of torch; or of jax, as `run_other` says.
        own: parameters that a kernel comes with. They are compared too, and the random ones lie
            about them, at their scale.
        run_other: what runs the other program.

    Raises:
        KernelCompilationError: naming the largest difference and where it is.
    """
    for draw in range(DRAWS):
        random = np.random.default_rng(draw)
        try:
            for params in _parameters(kernel, own, random):
                _compare(kernel, params, jax_program, other_program, run_other, random)
            return
        except KernelCompilationError:
            if draw == DRAWS - 1:
                raise


def _parameters(
    kernel: Checked, own: Mapping[str, np.ndarray] | None, random: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """The sets of parameters with which programs are compared."""
    dtype = array_dtype(kernel.signature.dtype)

    def draw(spec: ParameterSpec) -> np.ndarray:
        return random.standard_normal(spec.shape).astype(dtype) * dtype.type(spec.fan_in**-0.5)

    if own is None:
        return [{spec.name: draw(spec) for spec in kernel.parameters}]
    about = {}
    for spec in kernel.parameters:
        value = own[spec.name].astype(np.float32)
        scale = float(np.sqrt(np.mean(value * value))) if value.size else 0.0
        noise = draw(spec).astype(np.float32) * spec.fan_in**0.5 * (scale or spec.fan_in**-0.5)
        about[spec.name] = (value + noise).astype(dtype)
    return [dict(own), about]


def _compare(
    kernel: Checked,
    params: dict[str, np.ndarray],
    jax_program: Any,
    other_program: Any,
    run_other: Runner,
    random: np.random.Generator,
) -> None:
    dtype = array_dtype(kernel.signature.dtype)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(dtype)

    for batch in BATCHES:
        x = draw(batch, *kernel.signature.input_shape)
        cotangent = draw(batch, *kernel.signature.output_shape)
        ours = run_jax(jax_program, params, x, cotangent)
        theirs = run_other(other_program, params, x, cotangent)
        compare_results(ours, theirs, batch)


def compare_results(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], batch: int) -> None:
    """Compare what two programs gave, by name.

    Raises:
        KernelCompilationError: for the first that differs beyond the tolerance of its dtype.
    """
    for name, value in ours.items():
        if not np.isfinite(value).all():
            raise KernelCompilationError(
                f"{name} is not finite for inputs of both signs, at batch {batch}: a kernel must"
                " take what its layer gives. Clamp what goes into a logarithm, a root or a quotient"
            )
        if name not in theirs or theirs[name].shape != value.shape:
            raise KernelCompilationError(
                f"the two programs disagree at batch {batch}: jax gives {name} with shape"
                f" {value.shape}, torch {theirs[name].shape if name in theirs else 'none'}"
            )
        gap = difference(theirs[name], value)
        if not gap.within:
            raise KernelCompilationError(
                f"the two programs disagree at batch {batch}: {name} differs by"
                f" {gap.largest:.3g} {_place(theirs[name], value)}; at most {gap.allowed:.3g} is"
                " allowed"
            )


def _place(actual: np.ndarray, expected: np.ndarray) -> str:
    """Where two arrays differ most."""
    gap = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    worst = np.unravel_index(np.argmax(np.where(np.isnan(gap), np.inf, gap)), gap.shape)
    return f"at {[int(i) for i in worst]}"

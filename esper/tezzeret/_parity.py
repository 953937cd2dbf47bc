"""The gate: both programs of a kernel must compute the same, forward and backward."""

import warnings
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.errors import KernelCompilationError
from esper.tensors import from_torch, to_torch
from esper.tezzeret._programs import array_dtype
from esper.tezzeret._resolve import Graph
from esper_functional import difference

BATCHES = (1, 7)
"""Batch sizes at which the programs are compared."""

DRAWS = 3
"""Sets of random data, on one of which they must agree."""


@lru_cache(maxsize=1)
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
    with warnings.catch_warnings(), torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
        warnings.simplefilter("ignore", DeprecationWarning)
        y = program(*inputs.values(), source)
        y.backward(to_torch(cotangent))
    found = {"output": from_torch(y), "gradient of x": _gradient(source)}
    return found | {f"gradient of {name}": _gradient(p) for name, p in inputs.items()}


def _gradient(tensor: Any) -> np.ndarray:
    # What does not depend on an input has no gradient in torch, and one of zeros in jax.
    return from_torch(tensor.detach() * 0 if tensor.grad is None else tensor.grad)


def check_parity(graph: Graph, jax_program: Any, torch_program: Any) -> None:
    """Compare both programs on random data, parameters at random instead of at birth.

    They may disagree on one set of data and have two more to agree on: rounding can put a value on
    different sides of a kink, a ReLU's or a maximum's, where gradients jump, and a norm's gradient
    is large where its input hardly varies. Programs that are not the same disagree on all of them.

    Raises:
        KernelCompilationError: naming the largest difference and where it is.
    """
    for draw in range(DRAWS):
        try:
            _compare(graph, jax_program, torch_program, draw)
            return
        except KernelCompilationError:
            if draw == DRAWS - 1:
                raise


def _compare(graph: Graph, jax_program: Any, torch_program: Any, seed: int) -> None:
    random = np.random.default_rng(seed)
    dtype = array_dtype(graph.signature.dtype)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(dtype)

    params = {p.name: draw(*p.shape) * dtype.type(p.fan_in**-0.5) for p in graph.parameters}
    for batch in BATCHES:
        x = draw(batch, *graph.signature.input_shape)
        cotangent = draw(batch, *graph.signature.output_shape)
        ours = run_jax(jax_program, params, x, cotangent)
        theirs = run_torch(torch_program, params, x, cotangent)
        compare_results(ours, theirs, batch)


def compare_results(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], batch: int) -> None:
    """Compare what two programs gave, by name.

    Raises:
        KernelCompilationError: for the first that differs beyond the tolerance of its dtype.
    """
    for name, value in ours.items():
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

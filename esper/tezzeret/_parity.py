"""The gate: both programs of a kernel must compute the same, forward and backward."""

import warnings
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.errors import KernelCompilationError
from esper.tezzeret._blueprint import Graph
from esper_functional import difference

BATCHES = (1, 7)
"""Batch sizes at which the programs are compared."""


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

    inputs = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    source = torch.tensor(x, requires_grad=True)
    y = program(*inputs.values(), source)
    y.backward(torch.tensor(cotangent))
    named = {"output": y.detach(), "gradient of x": source.grad}
    named |= {f"gradient of {name}": p.grad for name, p in inputs.items()}
    return {name: value.numpy() for name, value in named.items() if value is not None}


def check_parity(graph: Graph, jax_program: Any, torch_program: Any) -> None:
    """Compare both programs on random data, parameters at random instead of at birth.

    Raises:
        KernelCompilationError: naming the largest difference and where it is.
    """
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(graph.signature.dtype)

    params = {
        p.name: draw(*p.shape) * np.float32(max(p.fan_in, 1) ** -0.5) for p in graph.parameters
    }
    for batch in BATCHES:
        x = draw(batch, *graph.signature.input_shape)
        cotangent = draw(batch, *graph.signature.output_shape)
        ours = run_jax(jax_program, params, x, cotangent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            theirs = run_torch(torch_program, params, x, cotangent)
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
                    f" {gap.largest:.3g}, at most {gap.allowed:.3g} is allowed"
                )

"""The programs of a resolved graph, one for each backend, and its first parameters."""

import io
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from esper.errors import InputError
from esper.tezzeret._blueprint import INPUT
from esper.tezzeret._resolve import Graph, ParameterSpec

Params = dict[str, Any]


def jax_program(graph: Graph) -> Callable[[Params, Any], Any]:
    """`apply(params, x)` over a batch, to be traced by jax."""

    def apply(params: Params, x: Any) -> Any:
        values: dict[str, Any] = {INPUT: x}
        for node in graph.nodes:
            own = {role: params[name] for role, name in node.params.items()}
            values[node.name] = node.op.jax([values[i] for i in node.op.inputs], own)
        return values[graph.output]

    return apply


def torch_source(graph: Graph) -> str:
    """The TorchScript method `forward(self, params..., x)`."""
    # Numbered, because `a.b_c` and `a_b.c` are two.
    carried = {p.name: f"p{i}_{p.name.replace('.', '_')}" for i, p in enumerate(graph.parameters)}
    arguments = "".join(f"{name}: Tensor, " for name in carried.values())
    lines = [f"def forward(self, {arguments}{INPUT}: Tensor) -> Tensor:"]
    # Names of nodes are prefixed: one may be called like a Python keyword.
    local = {INPUT: INPUT} | {node.name: f"v_{node.name}" for node in graph.nodes}
    for node in graph.nodes:
        own = {role: carried[name] for role, name in node.params.items()}
        sources = [local[i] for i in node.op.inputs]
        expression = node.op.torch(sources, own, node.input_shapes)
        lines.append(f"    {local[node.name]} = {expression}")
    lines.append(f"    return {local[graph.output]}")
    return "\n".join([*lines, ""])


def script_method(source: str) -> Any:
    """A scripted module with the method that `source` defines, and no parameters.

    It is defined in a compilation unit of its own, so that its class is called
    the same whatever was scripted before in the process.
    """
    import torch
    from torch.jit._recursive import wrap_cpp_module

    unit = torch._C.ScriptModule("__torch__.EsperKernel", torch._C.CompilationUnit(), True)  # pyright: ignore[reportCallIssue]
    module = wrap_cpp_module(unit)
    module.define(source)
    return module


def torch_program(graph: Graph) -> Any:
    """A scripted module `module(params..., x)`."""
    return script_method(torch_source(graph))


def torchscript_archive(module: Any) -> bytes:
    """The archive that `torch.jit.save` writes, as it comes."""
    import torch

    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def check_seed(init_seed: Any) -> None:
    """Check that numpy takes it.

    Raises:
        InputError: for what is no integer, or a negative one.
    """
    if type(init_seed) is not int or init_seed < 0:
        raise InputError(f"`init_seed` must be an integer from 0 on, got {init_seed!r}")


def initial_params(graph: Graph, init_seed: int) -> dict[str, np.ndarray]:
    """The parameters at birth; the same on every machine for one seed.

    In bfloat16 they are those of float32, rounded.

    Raises:
        InputError: for a seed that is none.
    """
    check_seed(init_seed)
    random = np.random.default_rng([init_seed, len(graph.parameters)])
    dtype = array_dtype(graph.signature.dtype)
    return {spec.name: _initial(spec, random).astype(dtype) for spec in graph.parameters}


def array_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name, `bfloat16` too."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _initial(spec: ParameterSpec, random: np.random.Generator) -> np.ndarray:
    bound = spec.fan_in**-0.5
    # Drawn whatever becomes of it, so that the draws of the others do not depend on it.
    draw = random.uniform(-bound, bound, spec.shape).astype(np.float32)
    if spec.init == "zeros":
        return np.zeros_like(draw)
    if spec.init == "ones":
        return np.full_like(draw, spec.value)
    if spec.init == "identity":
        return _identity(spec.shape)
    return draw


def _identity(shape: tuple[int, ...]) -> np.ndarray:
    """A matrix or a convolution's weights that pass each feature through: Dirac kernels."""
    out, per_group, *window = shape
    weights = np.zeros(shape, np.float32)
    middle = tuple(size // 2 for size in window)
    for channel in range(out):
        weights[(channel, channel % per_group, *middle)] = 1.0
    return weights

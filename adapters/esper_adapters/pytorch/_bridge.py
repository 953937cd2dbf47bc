"""Kernels of jax in torch: a compiled program of jax behind a function of autograd.

Tensors go over by DLPack, without copies where both sides allow it. The result is waited for
before torch goes on (on a CPU), or torch's stream is made to wait for it (on a GPU): what torch
changes in place afterwards, jax has read before.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from esper_adapters.pytorch._kernel import TorchKernel
from esper_functional import DerivativeError, KasminaException, Kernel, Program


def kernel_from_jax(
    kernel: Kernel,
    *,
    kernel_id: str = "",
    input_shape: tuple[int, ...] | None = None,
    output_shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    confidence: float = 0.5,
) -> TorchKernel:
    """A kernel of the core, to be grafted into layers of torch; see `TorchKernel`.

    Its parameters are torch's, and train there. Each call crosses into jax and back, forward and
    backward, which costs some 300 µs (README); it breaks the graph of `torch.compile`, has one
    derivative, and is no match for transforms of `torch.func`.
    """
    params = {name: to_torch(leaf).clone() for name, leaf in named_leaves(kernel.params).items()}
    return TorchKernel(
        kernel_id,
        JaxProgram(kernel.program, jax.tree.structure(kernel.params)),
        params,
        kernel.program.example_rank,
        input_shape,
        output_shape,
        dtype,
        confidence,
        route="bridge",
        twin=lambda: kernel,
    )


def named_leaves(params: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths, in the tree's order; a lone one is called `param`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "param": leaf
        for path, leaf in leaves
    }


def to_jax(tensor: Tensor) -> jax.Array:
    """A tensor as an array of jax, of the same memory where that is possible.

    Raises:
        KasminaException: for a dtype that jax would change without a word.
    """
    wide = tensor.dtype in (torch.float64, torch.int64, torch.complex128)
    if wide and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise KasminaException(
            f"{tensor.dtype} has no counterpart in jax while its 64-bit types are off: cast it, or"
            " set jax_enable_x64"
        )
    return jax.numpy.from_dlpack(tensor.detach().contiguous())


def to_torch(array: Any) -> Tensor:
    """An array of jax as a tensor of the same memory; waits for it on a CPU."""
    return torch.from_dlpack(jax.numpy.asarray(array))


class JaxProgram:
    """`program(*params, x)`, run by jax.

    Args:
        structure: of the tree that the parameters are the leaves of.
    """

    def __init__(self, program: Program, structure: Any) -> None:
        self.program = program
        self.structure = structure

        def run(params: Sequence[Any], x: Any) -> Any:
            return program.apply(jax.tree.unflatten(structure, params), x)

        def pull_back(params: Sequence[Any], x: Any, cotangent: Any) -> Any:
            return jax.vjp(run, params, x)[1](cotangent)

        self.run = jax.jit(run)
        self.pull_back = jax.jit(pull_back)

    def __reduce__(self) -> Any:
        raise KasminaException(
            f"a program of jax ({self.program.key[:30]}) cannot be pickled: save the model's"
            " state_dict, and load it into a model wrapped with the library"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "JaxProgram":
        return self

    def __call__(self, *args: Tensor) -> Tensor:
        """Run it, and wait for the result on a CPU."""
        k: Any = _cross(self, *args)
        return k


@torch.compiler.disable
def _cross(program: JaxProgram, *args: Tensor) -> Any:
    *params, x = args
    return _Bridge.apply(program, x, *params)


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: JaxProgram, x: Tensor, *params: Tensor) -> Tensor:
        ctx.program = program
        ctx.save_for_backward(x, *params)
        rank = program.program.example_rank
        lead = x.shape[: x.dim() - rank]
        rows = x.reshape(-1, *x.shape[x.dim() - rank :])
        k = to_torch(program.run([to_jax(p) for p in params], to_jax(rows)))
        return k.reshape(*lead, *k.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DerivativeError(
                "a kernel that runs over the bridge to jax has one derivative: leave out"
                " create_graph=True, or load the kernel by the route 'native'"
            )
        x, *params = ctx.saved_tensors
        program: JaxProgram = ctx.program
        rank = program.program.example_rank
        rows = x.reshape(-1, *x.shape[x.dim() - rank :])
        out = grads[0].dim() - (x.dim() - rank)
        d_k = grads[0].reshape(-1, *grads[0].shape[grads[0].dim() - out :])
        d_params, d_x = program.pull_back([to_jax(p) for p in params], to_jax(rows), to_jax(d_k))
        wants = ctx.needs_input_grad[1:]
        given = [d_x, *d_params]
        # Waited for whether it is wanted or not: jax reads memory of torch's.
        tensors = [to_torch(d) for d in given]
        tensors[0] = tensors[0].reshape(x.shape)
        return None, *(d if wanted else None for d, wanted in zip(tensors, wants, strict=True))

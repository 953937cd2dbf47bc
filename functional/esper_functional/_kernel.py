"""What may be grafted: a static program and its parameters."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array as JaxArray

from esper_functional._errors import KernelMismatchError

Params = Any
"""A pytree of arrays."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The static half of a kernel; equal to another exactly when `key` is.

    `apply(params, x)` takes x as `[batch, *example]` and returns an array of
    the host's output shape.
    """

    key: str
    """Identity of the computation, such as the SHA-256 of its StableHLO."""
    apply: Callable[[Params, Any], Any] = dataclasses.field(compare=False, repr=False)
    example_rank: int = dataclasses.field(default=1, compare=False)
    """Rank of one example's input."""
    batches: bool = dataclasses.field(default=True, compare=False)
    """Whether `apply` has batching rules; a deserialised program has none."""
    twin: Callable[[Params, Any], Any] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    """For a program without batching rules, the same computation with them, if there is one."""

    independent: bool = dataclasses.field(default=True, compare=False)
    """Whether an example's output depends on that example alone. A batch norm's does not, and then
    a mapped axis is not made part of the batch."""

    @property
    def mappable(self) -> Callable[[Params, Any], Any] | None:
        """The form that `jax.vmap` can map, or None."""
        return self.apply if self.batches else self.twin


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A pytree: `params` are leaves, `program` is structure."""

    program: Program
    params: Params


jax.tree_util.register_dataclass(Kernel, data_fields=["params"], meta_fields=["program"])


def kernel_from_function(
    apply: Callable[[Params, Any], Any], params: Params, *, example_rank: int = 1
) -> Kernel:
    """A kernel from any jax function `apply(params, x)` over a batch.

    Two kernels share compiled programs when they share the function object.

    Args:
        apply: takes `[batch, *example]` and returns what the host returns for it.
        params: a pytree of arrays.
        example_rank: rank of one example: 1 for vectors (a linear layer, or each position of
            a sequence), 2 for sequences `[time, features]`, 3 for images `[channels, h, w]`.
            All axes before it are batch.
    """
    name = getattr(apply, "__qualname__", type(apply).__name__)
    key = f"function:{name}:{id(apply):x}:{example_rank}"
    return Kernel(Program(key, apply, example_rank), params)


def check_kernel(
    kernel: Kernel,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    dtype: Any,
    where: str,
    *,
    input_dtype: Any = None,
) -> None:
    """Refuse a kernel whose structure does not fit, before anything runs.

    Args:
        in_shape: shape of one example's input at the site.
        out_shape: shape of one example's host output.
        dtype: dtype of both.
        where: the site and seed, for the message.
        input_dtype: dtype of the input, where it is another, as for an embedding.

    Raises:
        KernelMismatchError: with what was expected and what was found.
    """
    taken = jnp.dtype(dtype if input_dtype is None else input_dtype)
    x = jax.ShapeDtypeStruct((2, *in_shape), taken)
    kind = "" if taken == jnp.dtype(dtype) else f" of {taken.name}"
    expected = f"input {in_shape}{kind} -> output {out_shape} of {jnp.dtype(dtype).name}"
    advice = "Choose a kernel compiled for this signature."
    try:
        leaves, tree = jax.tree.flatten(kernel.params)
        y = _output(kernel.program, tree, tuple(jax.typeof(leaf) for leaf in leaves), x)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KernelMismatchError(
            f"the kernel does not fit {where}: expected {expected}; it refused such an input"
            f" ({type(error).__name__}: {reason}). {advice}"
        ) from error
    if not isinstance(y, jax.ShapeDtypeStruct):
        raise KernelMismatchError(
            f"the kernel does not fit {where}: expected {expected}; it returns a"
            f" {type(y).__name__} instead of one array. {advice}"
        )
    if (y.shape, y.dtype) != ((2, *out_shape), jnp.dtype(dtype)):
        batched = f", and for two examples {y.shape}" if y.shape[:1] != (2,) else ""
        raise KernelMismatchError(
            f"the kernel does not fit {where}: expected {expected}; its output is"
            f" {tuple(y.shape[1:])} of {y.dtype.name}{batched}. {advice}"
        )


@lru_cache(maxsize=256)
def _output(program: Program, tree: Any, types: tuple[Any, ...], x: Any) -> Any:
    """What a program gives, without running it: tracing takes as long as a small step."""
    params = [jax.ShapeDtypeStruct(t.shape, t.dtype, weak_type=t.weak_type) for t in types]
    return jax.eval_shape(program.apply, jax.tree.unflatten(tree, params), x)


def count_params(params: Params) -> int:
    """Number of scalars in a pytree of arrays."""
    leaves: list[JaxArray] = jax.tree.leaves(params)
    return sum(int(leaf.size) for leaf in leaves)

"""How the cost of a program grows with its batch.

Probation runs programs at small batches, so what grows faster than the batch would pass it and cost
whoever uses the kernel all the memory or time there is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from esper.errors import ArtifactError

GROWTH = (8, 128)
"""Batch sizes at which StableHLO is compiled."""
TORCH_GROWTH = (4, 16)
"""Batch sizes at which TorchScript is run: so small that the fifth power of one can be had."""

_SLACK = 2.0
"""How much faster than the batch costs may seem to grow."""


def _check(what: str, batches: tuple[int, int], small: float, large: float) -> None:
    few, many = batches
    if large > _SLACK * many / few * max(small, 1.0):
        raise ArtifactError(
            f"{what} grow from {small:.4g} at batch {few} to {large:.4g} at batch {many}, more than"
            " in proportion"
        )


def check_stablehlo(program: Callable[[Any, Any], Any], inputs: Callable[[int], Any]) -> float:
    """Refuse a program that costs more than in proportion to its batch, forward or backward.

    Args:
        program: `program(params, x)`.
        inputs: parameters, input and cotangent at a batch size.

    Returns:
        Floating-point operations for one example, forward and backward.

    Raises:
        ArtifactError: saying what grows.
    """

    def gradients(params: Any, x: Any, cotangent: Any) -> Any:
        y, pull_back = jax.vjp(program, params, x)
        return y, pull_back(cotangent)

    def cost(batch: int) -> dict[str, float]:
        lowered = jax.jit(gradients).lower(*map(_shapes, inputs(batch)))
        # It is not run, and the cost is read off before machine code is made.
        options: Any = {"xla_backend_optimization_level": 0}
        return lowered.compile(compiler_options=options).cost_analysis() or {}

    few, many = map(cost, GROWTH)
    for what in ("flops", "bytes accessed"):
        _check(f"its {what}", GROWTH, few.get(what, 0.0), many.get(what, 0.0))
    return few.get("flops", 0.0) / GROWTH[0]


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)), tree)


def check_torchscript(script: Any, inputs: Callable[[int], Sequence[Any]]) -> None:
    """Refuse a program one of whose operations costs more than in proportion to its batch.

    Its code is a straight line, so the operations are the same at all sizes and each is compared
    with itself; where torch chooses others by the size, all of them together.

    Args:
        script: `script(params..., x)`.
        inputs: its arguments at a batch size.

    Raises:
        ArtifactError: saying what grows.
    """
    few, many = (_operations(script, inputs(batch)) for batch in TORCH_GROWTH)
    if [name for name, _ in few] != [name for name, _ in many]:
        few, many = ([("operations", sum(work for _, work in ops))] for ops in (few, many))
    for (name, small), (_, large) in zip(few, many, strict=True):
        _check(f"the costs of its {name}", TORCH_GROWTH, small, large)


def _operations(script: Any, inputs: Sequence[Any]) -> list[tuple[str, float]]:
    """Each operation of torch that a call makes, and what it costs."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[tuple[str, float]] = []

    class Listener(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            # Which would import all of its compiler first.
            return False

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            found.append((str(func), _work(func, args, kwargs or {}, made)))
            return made

    with torch.no_grad(), torch.jit.optimized_execution(False), Listener():  # pyright: ignore[reportPrivateImportUsage]
        script(*inputs)
    return found


def _work(func: Any, args: Any, kwargs: Any, made: Any) -> float:
    """Floating-point operations of products; of all else, the elements made."""
    import torch
    from torch.utils.flop_counter import flop_registry

    outputs = made if isinstance(made, tuple | list) else (made,)
    elements = sum(t.numel() for t in outputs if isinstance(t, torch.Tensor))
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        return max(elements, count(*args, **kwargs, out_val=made))
    if "attention" in str(func):
        # Each query looks at each key; of those for the CPU the registry knows none.
        query, key = args[:2]
        return max(elements, query.numel() * math.prod(key.shape[-2:-1]))
    return elements

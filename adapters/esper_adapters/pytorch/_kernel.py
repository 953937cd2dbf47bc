"""A kernel in torch: a program over explicit parameters, and what layers it fits."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper_adapters.pytorch._module import ModuleProgram
from esper_functional import Kernel, KernelMismatchError


@dataclasses.dataclass(frozen=True)
class TorchKernel:
    """A program `program(*params, x)` over a batch, and its parameters at birth, in that order."""

    kernel_id: str
    program: Callable[..., Tensor]
    params: Mapping[str, Any]
    """Arrays of numpy or tensors, by name."""
    example_rank: int = 1
    """Axes of one example: 0 numbers or indices, 1 vectors, 2 sequences, 3 images."""
    input_shape: tuple[int, ...] | None = None
    """Of one example; None where it takes what it is given."""
    output_shape: tuple[int, ...] | None = None
    dtype: str | None = None
    confidence: float = 0.5
    route: str = "native"
    """How it runs: "torchscript" (an artifact's), "native" (torch's own operations), "bridge" (a
    program of jax)."""
    twin: Callable[[], Kernel] | None = None
    """Gives the same kernel of the core, where there is one; for `to_functional`."""


Resolve = Callable[[str], TorchKernel]
"""Finds a kernel by its id; raises LookupError where there is none."""


def kernel_from_function(
    function: Callable[..., Tensor],
    params: Mapping[str, Any],
    *,
    kernel_id: str = "",
    example_rank: int = 1,
    confidence: float = 0.5,
) -> TorchKernel:
    """A kernel of `function(*params, x)`, which takes and returns a batch."""
    return TorchKernel(
        kernel_id, function, dict(params), example_rank, confidence=confidence, route="native"
    )


def kernel_from_module(
    module: nn.Module, *, kernel_id: str = "", example_rank: int = 1, confidence: float = 0.5
) -> TorchKernel:
    """A kernel of a module, which is copied.

    Its parameters train unless they were frozen; its buffers are saved with them, and change in
    training as the module does it.

    Grafted, it trains and evaluates with the model; by itself it runs in the mode that it is in.
    """
    program = ModuleProgram(module)
    params = {name: p.detach() for name, p in program.module.named_parameters()}
    return TorchKernel(kernel_id, program, params, example_rank, confidence=confidence)


Shape = tuple[int | None, ...]
"""Of one example; None for a size that only a call tells."""


@dataclasses.dataclass(frozen=True)
class LayerShapes:
    """What is known of a layer's examples; None for what only a call tells."""

    inputs: Shape | None = None
    outputs: Shape | None = None
    dtype: str | None = None
    device: torch.device | None = None


def check_torch_kernel(kernel: TorchKernel, expected: LayerShapes, where: str) -> None:
    """Refuse a kernel whose structure does not fit, before the layer is touched.

    A kernel that does not say its shapes is run once on zeros, where the layer's are known.

    Raises:
        KernelMismatchError: with what was expected and what was found.
    """
    kernel_name = f"kernel {kernel.kernel_id[:12] or 'without an id'}"
    wanted = (expected.inputs, expected.outputs, expected.dtype)
    given = (kernel.input_shape, kernel.output_shape, kernel.dtype or _dtype(kernel))
    same_dtype = wanted[2] is None or given[2] is None or wanted[2] == given[2]
    if not (_fits(wanted[0], given[0]) and _fits(wanted[1], given[1]) and same_dtype):
        raise KernelMismatchError(
            f"{kernel_name} does not fit {where}: expected {_signature(*wanted)}, found"
            f" {_signature(*given)}. Choose a kernel compiled for this signature."
        )
    program = kernel.program
    tensors = list(program.module.buffers()) if isinstance(program, ModuleProgram) else []
    elsewhere = {str(t.device) for t in tensors if expected.device not in (None, t.device)}
    if elsewhere:
        raise KernelMismatchError(
            f"{kernel_name} does not fit {where}: the layer is on {expected.device}, and buffers"
            f" of the kernel's module on {', '.join(sorted(elsewhere))}. Move the module there"
            " first; its parameters come along by themselves"
        )
    if kernel.input_shape is None:
        _try(kernel, expected, f"{kernel_name} does not fit {where}")


def _try(kernel: TorchKernel, expected: LayerShapes, what: str) -> None:
    """Run a kernel that has not said its shapes on a layer that has."""
    inputs, outputs = expected.inputs, expected.outputs
    dtype, device = expected.dtype, expected.device
    if inputs is None or outputs is None or dtype is None or device is None:
        return
    sizes = [size for size in inputs if size is not None]
    unknown = len(sizes) < len(inputs) or None in outputs or device.type == "meta"
    if unknown or kernel.example_rank < len(inputs):
        return
    lead = (2,) * (kernel.example_rank - len(inputs) + 1)
    x = torch.zeros(*lead, *sizes, dtype=getattr(torch, dtype), device=device)
    params = [torch.as_tensor(p).detach().to(device) for p in kernel.params.values()]
    devices = [device] if device.type == "cuda" else []
    try:
        version = x._version
        with torch.no_grad(), torch.random.fork_rng(devices):
            k: Any = kernel.program(*params, x)
        if x._version != version:
            raise ValueError("it changes its input in place, which its host has too")
        if not isinstance(k, Tensor):
            raise TypeError(f"it gives a {type(k).__name__}, and not a tensor")
        found = f"it returned {str(k.dtype).removeprefix('torch.')}{list(k.shape)}"
        fits = tuple(k.shape) == (*lead, *outputs) and found.startswith(f"it returned {dtype}[")
    except Exception as error:  # whatever a user's own function raises
        fits, found = False, f"it raised {type(error).__name__}: {error}"
    if not fits:
        raise KernelMismatchError(
            f"{what}: for zeros of {dtype}{[*lead, *sizes]} it should return"
            f" {dtype}{[*lead, *outputs]}, and {found}"
        )


def _fits(wanted: Shape | None, given: Shape | None) -> bool:
    if wanted is None or given is None:
        return True
    pairs = zip(wanted, given, strict=False)
    return len(wanted) == len(given) and all(None in pair or pair[0] == pair[1] for pair in pairs)


def _dtype(kernel: TorchKernel) -> str | None:
    """Of its floating-point parameters, where they have one."""
    params = [torch.as_tensor(p) for p in kernel.params.values()]
    kinds = {p.dtype for p in params if p.is_floating_point()}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None


def _signature(inputs: Any, outputs: Any, dtype: str | None) -> str:
    def shape(sizes: Any) -> str:
        if sizes is None:
            return "any"
        return "x".join("any" if size is None else str(size) for size in sizes)

    return f"{shape(inputs)}->{shape(outputs)} {dtype or 'any dtype'}"

"""A kernel in torch: a program over explicit parameters, and its place in a module."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper_functional import KernelMismatchError

GONE = "_esper_gone"
"""Set on the parameters of a kernel that was taken out of its layer, for optimisers."""


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
    module: nn.Module | None = None
    """What it was made from, if that is a module; for `export_plain`."""
    route: str = "native"
    """How it runs: "torchscript" (an artifact's), "native" (torch's own operations)."""


class _Gate:
    """Carries a kernel's verdict from its forward pass to its backward pass."""

    finite: Tensor


def _per_example(ok: Tensor, lead: int) -> Tensor:
    """Which examples are True throughout: `[*lead, 1, ...]`, broadcasts against `ok`."""
    inner = ok.dim() - lead
    if inner == 0:
        return ok
    if inner == 1:
        return ok.all(-1, keepdim=True)
    return ok.flatten(lead).all(-1).view(*ok.shape[:lead], *(1,) * inner)


class _Contain(torch.autograd.Function):
    """The identity, whose gradients are withheld where the kernel was not finite.

    To the input: for each example whose output or whose own gradient is not finite. To the
    parameters: for the whole step if any output was not, and number by number.
    """

    @staticmethod
    def forward(ctx: Any, gate: _Gate, lead: int, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.gate, ctx.lead = gate, lead
        own = x.view_as(x)
        if not x.is_floating_point():
            ctx.mark_non_differentiable(own)
        return own, *(p.view_as(p) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        finite, lead = ctx.gate.finite, ctx.lead
        _, _, wants_x, *wants = ctx.needs_input_grad
        d_x = None
        if wants_x:
            row = finite.reshape(*finite.shape[:lead], *(1,) * (grads[0].dim() - lead))
            ok = row & _per_example(torch.isfinite(grads[0]), lead)
            d_x = torch.where(ok, grads[0], 0.0)
        clean = finite.all() if any(wants) else finite
        d_params = (
            torch.where(clean & torch.isfinite(g), g, 0.0) if wanted else None
            for g, wanted in zip(grads[1:], wants, strict=True)
        )
        return None, None, d_x, *d_params


def _attribute_names(names: list[str]) -> tuple[str, ...]:
    """Names that a module can register: no dots, all different."""
    plain = [name.replace(".", "_") for name in names]
    if len(set(plain)) == len(plain):
        return tuple(plain)
    return tuple(f"{name}_{i}" for i, name in enumerate(plain))


class GraftedKernel(nn.Module):
    """The parameters of one kernel, registered where they train and are saved."""

    def __init__(self, kernel: TorchKernel, device: torch.device) -> None:
        super().__init__()
        self.kernel_id = kernel.kernel_id
        self.route = kernel.route
        self.example_rank = kernel.example_rank
        self.frozen = False
        self._module = (kernel.module,)
        # Not a child module: a loaded program has no parameters of its own, and
        # registering it would put it in the way of `.to()` and `state_dict`.
        self._program = (kernel.program,)
        self._names = _attribute_names(list(kernel.params))
        for name, value in zip(self._names, kernel.params.values(), strict=True):
            own = torch.as_tensor(value).detach().clone().to(device)
            trains = own.is_floating_point() or own.is_complex()
            self.register_parameter(name, nn.Parameter(own, requires_grad=trains))

    @property
    def module(self) -> nn.Module | None:
        """The module that the program was made from, with the parameters it had then."""
        return self._module[0]

    def leave(self) -> None:
        """Mark the parameters as no longer a part of any model."""
        for p in self.parameters():
            setattr(p, GONE, True)

    def ordered_parameters(self) -> list[Tensor]:
        """The parameters in the order of the program's arguments."""
        # By attribute: under `torch.func.functional_call` they are plain tensors.
        return [getattr(self, name) for name in self._names]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, `[*batch, *out]`, and whether each example is finite, `[*batch, 1, ...]`."""
        params = self.ordered_parameters()
        if self.frozen:
            params = [p.detach() for p in params]
        lead = x.dim() - self.example_rank
        if torch.is_grad_enabled():
            gate = _Gate()
            x, *params = _Contain.apply(gate, lead, x, *params)
            k = self._program[0](*params, x)
            gate.finite = _per_example(torch.isfinite(k), lead)
            return k, gate.finite
        k = self._program[0](*params, x)
        return k, _per_example(torch.isfinite(k), lead)


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
    """A kernel of a module without buffers that its call changes; its parameters are copied.

    The module runs in the mode that it is in.
    """
    names = [name for name, _ in module.named_parameters()]
    buffers = dict(module.named_buffers())

    def program(*args: Tensor) -> Tensor:
        *own, x = args
        return torch.func.functional_call(
            module, {**buffers, **dict(zip(names, own, strict=True))}, (x,)
        )

    params = {name: p.detach() for name, p in module.named_parameters()}
    return TorchKernel(
        kernel_id, program, params, example_rank, confidence=confidence, module=module
    )


def check_torch_kernel(kernel: TorchKernel, expected: "LayerShapes", where: str) -> None:
    """Refuse a kernel whose structure does not fit, before the layer is touched.

    Raises:
        KernelMismatchError: with what was expected and what was found.
    """
    wanted = (expected.inputs, expected.outputs, expected.dtype)
    given = (kernel.input_shape, kernel.output_shape, kernel.dtype)
    clash = any(
        w is not None and g is not None and w != g for w, g in zip(wanted, given, strict=True)
    )
    if clash:
        raise KernelMismatchError(
            f"kernel {kernel.kernel_id[:12]} does not fit {where}: expected {_signature(*wanted)},"
            f" found {_signature(*given)}. Choose a kernel compiled for this signature."
        )


def _signature(inputs: Any, outputs: Any, dtype: str | None) -> str:
    def shape(sizes: Any) -> str:
        return "any" if sizes is None else "x".join(map(str, sizes))

    return f"{shape(inputs)}->{shape(outputs)} {dtype or 'any dtype'}"


@dataclasses.dataclass(frozen=True)
class LayerShapes:
    """What is known of a layer's examples; None for what only a call tells."""

    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None
    dtype: str | None = None

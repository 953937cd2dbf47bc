"""A kernel in torch: a program over explicit parameters, and its place in a module."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper_functional import KernelMismatchError


@dataclasses.dataclass(frozen=True)
class TorchKernel:
    """A loaded artifact: `program(*params, x)` and its parameters at birth, in that order."""

    kernel_id: str
    program: Callable[..., Tensor]
    params: Mapping[str, np.ndarray]
    in_features: int
    out_features: int
    dtype: str
    confidence: float = 0.5


class _Gate:
    """Carries a kernel's verdict from its forward pass to its backward pass."""

    finite: Tensor


class _Contain(torch.autograd.Function):
    """The identity, whose gradients are withheld where the kernel was not finite.

    To the input: for each example whose output or whose own gradient is not
    finite. To the parameters: for the whole step if any output was not.
    """

    @staticmethod
    def forward(ctx: Any, gate: _Gate, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        return x.view_as(x), *(p.view_as(p) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        finite = ctx.gate.finite
        _, wants_x, *wants = ctx.needs_input_grad
        d_x = None
        if wants_x:
            ok = finite & torch.isfinite(grads[0]).all(-1, keepdim=True)
            d_x = torch.where(ok, grads[0], 0.0)
        clean = finite.all() if any(wants) else finite
        d_params = (
            torch.where(clean, g, 0.0) if wanted else None
            for g, wanted in zip(grads[1:], wants, strict=True)
        )
        return None, d_x, *d_params


class GraftedKernel(nn.Module):
    """The parameters of one kernel, registered where they train and are saved."""

    def __init__(self, kernel: TorchKernel, device: torch.device) -> None:
        super().__init__()
        self.kernel_id = kernel.kernel_id
        self.frozen = False
        # Not a child module: a loaded program has no parameters of its own, and
        # registering it would put it in the way of `.to()` and `state_dict`.
        self._program = (kernel.program,)
        self._names = tuple(name.replace(".", "_") for name in kernel.params)
        for name, value in zip(self._names, kernel.params.values(), strict=True):
            self.register_parameter(name, nn.Parameter(torch.tensor(value, device=device)))

    def ordered_parameters(self) -> list[nn.Parameter]:
        """The parameters in the order of the program's arguments."""
        return [self.get_parameter(name) for name in self._names]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, `[*batch, out]`, and whether each example is finite, `[*batch, 1]`."""
        params: list[Tensor] = list(self.ordered_parameters())
        if self.frozen:
            params = [p.detach() for p in params]
        if torch.is_grad_enabled():
            gate = _Gate()
            x, *params = _Contain.apply(gate, x, *params)
            k = self._program[0](*params, x)
            gate.finite = torch.isfinite(k).all(-1, keepdim=True)
            return k, gate.finite
        k = self._program[0](*params, x)
        return k, torch.isfinite(k).all(-1, keepdim=True)


def check_torch_kernel(kernel: TorchKernel, layer: nn.Linear, where: str) -> None:
    """Refuse a kernel whose structure does not fit, before the layer is touched.

    Raises:
        KernelMismatchError: with what was expected and what was found.
    """
    dtype = str(layer.weight.dtype).removeprefix("torch.")
    expected = (layer.in_features, layer.out_features, dtype)
    found = (kernel.in_features, kernel.out_features, kernel.dtype)
    if found != expected:
        raise KernelMismatchError(
            f"kernel {kernel.kernel_id[:12]} does not fit {where}: expected"
            f" {expected[0]}->{expected[1]} {expected[2]}, found {found[0]}->{found[1]} {found[2]}."
            " Choose a kernel compiled for this signature."
        )

"""Keeping a kernel that is not finite out of its host's output and gradients.

Two ways to the same numbers. Where torch runs what it is told, one function stands before the
kernel's program, and what was found after it waits on the side for the backward pass. Where torch
traces or transforms (`torch.compile`, `torch.export`, `torch.func`) nothing may wait on the side:
a second function stands behind the program, and its verdict travels to the first one as the
gradient of a token that the two share.
"""

import cmath
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_functional import KernelMismatchError

Verdict = Tensor | None
"""Which examples are finite, `[*batch, 1, …]`; None where it is known that all are."""


def run_contained(
    program: Callable[..., Tensor],
    params: Sequence[Tensor],
    x: Tensor,
    example_rank: int,
    contain: bool = True,
) -> tuple[Tensor, Verdict]:
    """`program(*params, x)`, whose gradients are withheld where they or it are not finite.

    Those to the input for each example whose output or own gradient is not finite; those to the
    parameters, which are sums over examples, altogether where any output is not finite, and else
    number by number.

    Args:
        x: `[*batch, *example]`.
        example_rank: axes of one example.
        contain: False leaves the gradients as they are.

    Returns:
        The output, `[*batch, *out]`, and its verdict.
    """
    lead = x.dim() - example_rank
    if lead < 0:
        raise KernelMismatchError(
            f"a kernel of examples with {example_rank} axes cannot take an input of {x.dim()}"
        )
    transformed = is_transformed()
    trains = contain and torch.is_grad_enabled()
    if not trains or not (x.requires_grad or _any_trains(params)):
        k = program(*params, x)
        return k, finite_examples(k, lead) if transformed else _look(k, lead)
    if transformed:
        token, x, *own = _Enter.apply(lead, x, *params)
        return _Leave.apply(lead, program(*own, x), token)
    gate = _Gate()
    x, *own = _Contain.apply(gate, lead, x, *params)
    k = program(*own, x)
    gate.verdict = verdict = _look(k, lead)
    return k, verdict


def _any_trains(params: Sequence[Tensor]) -> bool:
    for p in params:  # a generator costs a microsecond  # noqa: SIM110
        if p.requires_grad:
            return True
    return False


def is_transformed() -> bool:
    """Whether torch traces or transforms what is run, so that no number may be looked at."""
    return (
        torch.compiler.is_compiling() or in_transform() or torch._C._get_tracing_state() is not None
    )


def in_transform() -> bool:
    """Whether a transform of torch.func is under way; not to be asked while compiling."""
    # There is no public way to ask.
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


def finite_examples(k: Tensor, lead: int) -> Tensor:
    """Which examples are finite throughout: `[*lead, 1, …]`, broadcasts against `k`."""
    return _throughout(torch.isfinite(k), lead)


def _throughout(ok: Tensor, lead: int) -> Tensor:
    inner = ok.dim() - lead
    if inner == 0:
        return ok
    if inner == 1:
        return ok.all(-1, keepdim=True)
    return ok.flatten(lead).all(-1).view(*ok.shape[:lead], *(1,) * inner)


def _look(k: Tensor, lead: int) -> Verdict:
    # A CPU has what it has computed, and a finite sum has no term that is not finite.
    if type(k) is Tensor and k.is_cpu and cmath.isfinite(k.detach().sum().item()):
        return None
    return finite_examples(k.detach(), lead)


def _contained(
    lead: int, finite: Verdict, wants: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the input and of the parameters, as far as they are given on.

    Args:
        finite: `[*lead]`, or with axes of one number behind them.
    """
    (wants_x, *wants_params), (d_x, *d_params) = wants, grads
    given: list[Tensor | None] = [None] * len(grads)
    if wants_x:
        ok = finite_examples(d_x, lead)
        if finite is not None:
            ok = ok & finite.reshape(*finite.shape[:lead], *(1,) * (d_x.dim() - lead))
        given[0] = torch.where(ok, d_x, 0.0)
    clean = None if finite is None or not any(wants_params) else finite.all()
    for i, (g, wanted) in enumerate(zip(d_params, wants_params, strict=True), 1):
        if wanted:
            ok = torch.isfinite(g) if clean is None else clean & torch.isfinite(g)
            given[i] = torch.where(ok, g, 0.0)
    return given


class _Gate:
    """Where a program's verdict waits for its backward pass."""

    verdict: Verdict


class _Contain(torch.autograd.Function):
    """The identity, whose gradients are contained by a verdict that is given later."""

    @staticmethod
    def forward(ctx: Any, gate: _Gate, lead: int, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.gate, ctx.lead = gate, lead
        own = x.view_as(x)
        if not (x.is_floating_point() or x.is_complex()):
            ctx.mark_non_differentiable(own)
        return own, *(p.view_as(p) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        verdict = ctx.gate.verdict
        if verdict is None:
            for g in grads:
                if not cmath.isfinite(g.sum().item()):
                    break
            else:
                return None, None, *grads
        return None, None, *_contained(ctx.lead, verdict, ctx.needs_input_grad[2:], grads)


class _Enter(torch.autograd.Function):
    """`_Contain` for transforms: the verdict comes as the gradient of the token, `[*lead]`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lead: int, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        token = torch.zeros(x.shape[:lead], device=x.device)
        return token, x.view_as(x), *(p.view_as(p) for p in params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.lead = inputs[0]
        if not (inputs[1].is_floating_point() or inputs[1].is_complex()):
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        verdict, *own = grads
        return None, *_contained(ctx.lead, verdict > 0, ctx.needs_input_grad[1:], own)


class _Leave(torch.autograd.Function):
    """The identity behind a program, which tells `_Enter` what was finite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lead: int, k: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return k.view_as(k), finite_examples(k, lead)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.lead = inputs[0]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        (finite,) = ctx.saved_tensors
        return None, grads[0], finite.reshape(finite.shape[: ctx.lead]).to(torch.float32)

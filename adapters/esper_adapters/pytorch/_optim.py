"""Optimisers of torch, along with the surgery of their models."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from esper_adapters.pytorch._grafted import GONE, GraftedKernel
from esper_functional import KasminaException

_REFUSED = ("LBFGS",)
"""Optimisers that keep one state for all parameters together."""


def grafted_kernels(model: nn.Module) -> list[GraftedKernel]:
    """The kernels of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, GraftedKernel)]


def carry_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    saved: Mapping[str, Any] | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Fit an optimiser to what grafts, unloads, fossils, folds and failures made of its model.

    In place: the parameters of each new kernel join in a group of their own, with the optimiser's
    defaults and no state yet, which has the kernel's path under "kernel"; those of kernels that
    are gone or frozen leave it, with their state. Nobody else's state, group or learning rate is
    touched. A new group is as far along a schedule as the first one is; schedulers that keep a list
    of their own by groups (`LambdaLR`, `OneCycleLR` and their like) are to be made anew after it.

    Args:
        optimizer: any of `torch.optim` that keeps its state by parameter.
        model: as it is now.
        saved: the state_dict of an optimiser that is to be loaded next. Its groups have the order
            in which its kernels came, and new ones join in that order here.
        options: of the new groups, such as `lr`, where they are not the optimiser's defaults.

    Returns:
        The optimiser itself.

    Raises:
        KasminaException: for an optimiser that keeps one state for all parameters together.
    """
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED:
            raise KasminaException(
                f"carry_optimizer: {kind.__name__} keeps one state for all parameters together,"
                " which cannot be carried over: make a new one"
            )
    own = [p for kernel in grafted_kernels(model) for p in kernel.parameters()]
    leaving = {id(p) for p in own if not p.requires_grad}
    emptied: list[int] = []
    for group in optimizer.param_groups:
        kept = []
        for p in group["params"]:
            if id(p) in leaving or getattr(p, GONE, False):
                optimizer.state.pop(p, None)
            else:
                kept.append(p)
        if len(kept) != len(group["params"]):
            _keep(group, kept)
            emptied += [] if kept else [id(group)]
    optimizer.param_groups = [g for g in optimizer.param_groups if id(g) not in emptied]
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    order = [] if saved is None else [group.get("kernel") for group in saved["param_groups"]]
    joining: dict[str, list[nn.Parameter]] = {}
    for path, kernel in model.named_modules():
        if isinstance(kernel, GraftedKernel):
            new = [p for p in kernel.parameters() if p.requires_grad and id(p) not in known]
            joining |= {path: new} if new else {}
    for path in sorted(
        joining, key=lambda path: order.index(path) if path in order else len(order)
    ):
        _join(optimizer, model, joining[path], {"kernel": path, **options})
    return optimizer


def _keep(group: dict[str, Any], kept: list[nn.Parameter]) -> None:
    names = group.get("param_names")
    if names is not None:
        staying = {id(p) for p in kept}
        pairs = zip(names, group["params"], strict=True)
        group["param_names"] = [name for name, p in pairs if id(p) in staying]
    group["params"] = kept


def _scheduled(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a scheduler has written into groups: a new one is as far along its schedule."""
    if not optimizer.param_groups:
        return {}
    first, defaults = optimizer.param_groups[0], optimizer.defaults
    known = {*defaults, "params", "param_names", "kernel"}
    extra = {name: value for name, value in first.items() if name not in known}
    if extra.get("initial_lr"):
        extra["initial_lr"] = defaults["lr"]
        extra["lr"] = defaults["lr"] * first["lr"] / first["initial_lr"]
    return extra


def _join(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    params: Iterable[nn.Parameter],
    options: dict[str, Any],
) -> None:
    """A new group; named where the others are, as torch asks for."""
    group: dict[str, Any] = {"params": list(params), **_scheduled(optimizer), **options}
    if any("param_names" in own for own in optimizer.param_groups):
        names = {id(p): name for name, p in model.named_parameters()}
        group["params"] = [(names[id(p)], p) for p in group["params"]]
    optimizer.add_param_group(group)

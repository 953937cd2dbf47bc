"""Optimisers of torch with a parameter group for the host and one for each kernel."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from esper.errors import InputError
from esper.tolaria._torch_foreach import copy_all, scale_all
from esper.tolaria._trainee import Optimisation, Rates

HOST = -1
"""The group of the host; those of kernels go by their slots."""


@dataclasses.dataclass
class Group:
    """Parameters that are clipped and stepped together."""

    params: dict[str, nn.Parameter]
    """Those that train, by name."""
    options: dict[str, Any]
    """The optimiser's own group."""
    averages: dict[str, Tensor]
    """Moving averages of the parameters; empty where none are kept."""


class GroupedOptimiser:
    """Adam, AdamW, or SGD with momentum, by torch's fused implementations on every device.

    Averages follow a ← decay · a + (1 − decay) · p after each step, from the first parameters on
    (Polyak and Juditsky, 1992, with exponential weights).

    Args:
        host: the host's parameters by name; those that are frozen are left alone.

    Raises:
        InputError: for options that the chosen optimiser does not have.
    """

    def __init__(self, host: Mapping[str, nn.Parameter], optimisation: Optimisation) -> None:
        chosen = optimisation
        if chosen.optimizer == "adam" and chosen.weight_decay:
            raise InputError(
                f"weight_decay is {chosen.weight_decay}, and adam has none that is decoupled from"
                " the gradient: choose the optimizer adamw"
            )
        if chosen.optimizer != "sgd" and chosen.momentum:
            raise InputError(
                f"momentum is {chosen.momentum}, and is of sgd alone: {chosen.optimizer} has"
                " moments of its own; leave it out, or choose the optimizer sgd"
            )
        self._clip = chosen.clip_norm
        self._decay = chosen.weight_decay if chosen.optimizer == "sgd" else 0.0
        self._ema = chosen.ema_decay
        # The rate comes with every step.
        options: dict[str, Any] = {"lr": 0.0, "fused": True}
        if chosen.optimizer == "adamw":
            options["weight_decay"] = chosen.weight_decay
        if chosen.optimizer == "sgd":
            options["momentum"] = chosen.momentum
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        first: list[dict[str, Any]] = [{"params": []}]
        self._own: torch.optim.Optimizer = kinds[chosen.optimizer](first, **options)
        self._own.param_groups.clear()
        self._average = None if self._ema is None else get_ema_multi_avg_fn(self._ema)
        self.groups: dict[int, Group] = {}
        self.adopt(HOST, host)

    def adopt(self, slot: int, params: Mapping[str, nn.Parameter]) -> None:
        """Train the parameters of a new kernel; all others keep their moments and averages."""
        train = {name: p for name, p in params.items() if p.requires_grad}
        self._own.add_param_group({"params": list(train.values())})
        kept = self._average is not None
        averages = {name: p.detach().clone() for name, p in train.items()} if kept else {}
        self.groups[slot] = Group(train, self._own.param_groups[-1], averages)

    def forget(self, slot: int) -> None:
        """Train a kernel no longer; all others keep their moments and averages."""
        group = self.groups.pop(slot, None)
        if group is None:
            return
        left = [own for own in self._own.param_groups if own is not group.options]
        self._own.param_groups[:] = left
        for p in group.params.values():
            self._own.state.pop(p, None)

    @torch.no_grad()
    def settle(self, slot: int) -> None:
        """Make a group's averages its parameters: a fossil is what the network was judged by."""
        group = self.groups[slot]
        copy_all([group.params[name] for name in group.averages], list(group.averages.values()))

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self._own.zero_grad(set_to_none=True)

    def set_rates(self, rates: Rates) -> None:
        """Update by these rates from now on."""
        for slot, group in self.groups.items():
            group.options["lr"] = (
                rates.host if slot == HOST else rates.kernels.get(slot, rates.host)
            )

    def update(self) -> None:
        """One step by the gradients that there are, with the rates that were set."""
        if self._clip is not None or self._decay:
            for group in self.groups.values():
                self._clip_and_decay(list(group.params.values()), group.options["lr"])
        self._own.step()
        if self._average is not None:
            for group in self.groups.values():
                if group.averages:
                    averages = list(group.averages.values())
                    self._average(averages, list(group.params.values()), 0)

    @torch.no_grad()
    def _clip_and_decay(self, params: list[nn.Parameter], rate: float) -> None:
        # Parameters without a gradient are not stepped by torch's optimisers either.
        moving = [p for p in params if p.grad is not None]
        if not moving:
            return
        if self._clip is not None:
            grads = [p.grad for p in moving if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            # Exactly 1 where nothing is clipped; nobody waits for the device.
            scale_all(grads, torch.where(norm > self._clip, self._clip / norm, 1.0))
        if self._decay:
            scale_all(moving, 1.0 - rate * self._decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages in the place of parameters within, which come back as they were."""
        if self._average is None:
            yield
            return
        pairs = [
            (p, group.averages[name])
            for group in self.groups.values()
            for name, p in group.params.items()
        ]
        trained = [p.data for p, _ in pairs]
        try:
            for p, average in pairs:
                p.data = average
            yield
        finally:
            for (p, _), data in zip(pairs, trained, strict=True):
                p.data = data

    def moments(self, slot: int) -> dict[str, dict[str, Tensor]]:
        """What the optimiser keeps of each parameter of a group that it has stepped."""
        own = self._own.state
        return {
            name: {key: value for key, value in own[p].items() if isinstance(value, Tensor)}
            for name, p in self.groups[slot].params.items()
            if own.get(p)
        }

    def take_moments(self, slot: int, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep these moments, in memory of the optimiser's own, and no others of a group."""
        for name, p in self.groups[slot].params.items():
            given = moments.get(name)
            if not given:
                self._own.state.pop(p, None)
                continue
            held = self._own.state[p]
            if held.keys() == given.keys():
                copy_all([held[key] for key in given], list(given.values()))
            else:
                # Fused optimisers keep their counts of steps where the parameters are.
                self._own.state[p] = {key: v.to(p.device, copy=True) for key, v in given.items()}

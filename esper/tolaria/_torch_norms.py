"""Norms of the host's parameters at each layer, and of the loss's gradient by them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.tamiyo import SiteNorms
from esper.tolaria._torch_data import Examples, Objective
from esper.tolaria._torch_network import TorchNetwork


def site_norms(network: TorchNetwork, objective: Objective, examples: Examples) -> SiteNorms:
    """By layer row, of the mean loss; gradients are returned and not added to the parameters'."""
    trains = [p for p in network.host.values() if p.requires_grad]
    with torch.enable_grad():
        loss = objective.loss(network.model(examples.x), examples.y)
        depends = bool(trains) and loss.requires_grad
        found = torch.autograd.grad(loss, trains, allow_unused=True) if depends else ()
    pairs = zip(trains, found, strict=depends)
    gradients = {id(p): gradient for p, gradient in pairs if gradient is not None}
    each = [[gradients[id(p)] for p in own if id(p) in gradients] for own in network.own]
    zero = loss.detach().new_zeros(())
    norms = [_norm(own, zero) for own in (*each, *([p.detach() for p in o] for o in network.own))]
    both = torch.stack(norms).cpu().numpy().reshape(2, -1)
    return SiteNorms(both[0], both[1])


def _norm(tensors: Sequence[Tensor], zero: Tensor) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors).to(zero) if tensors else zero

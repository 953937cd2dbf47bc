"""What layers see on some examples, and how the loss depends on what they give."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.errors import InputError
from esper.tamiyo import Probe
from esper.tolaria._torch_data import Examples, Objective
from esper.tolaria._torch_network import TorchNetwork
from esper.tolaria._torch_survey import Site


def probes(
    network: TorchNetwork,
    objective: Objective,
    sites: Mapping[int, Site | str],
    examples: Examples,
) -> dict[int, Probe]:
    """Inputs and outputs of layers, and the gradients of the mean loss by those outputs.

    In evaluation mode, where nothing is drawn, counted or averaged, and in float32 whatever the
    run's precision. Of one layer, the gradient goes back to it and no further.

    Args:
        sites: the layers, by row.

    Raises:
        InputError: for a layer that is not called once, with an axis for the batch.
    """
    for row, site in sites.items():
        if isinstance(site, str):
            raise InputError(
                f"layer {network.layers[row].layer_name!r} cannot be probed: {site}. Let kernels be"
                " grafted elsewhere, by `grow_at`, or take triggers and initialisations that need"
                " no probe"
            )
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def nudge(row: int, args: Any, options: Any, result: Any) -> Any:
        several = isinstance(result, tuple | list)
        given = result[0] if several else result
        # What lies before a layer alone keeps nothing for a backward pass.
        first = given.detach() if len(sites) == 1 else given
        leaf = torch.zeros_like(first, requires_grad=True)
        seen[row] = (args[0] if args else next(iter(options.values())), given.detach(), leaf)
        return type(result)([first + leaf, *result[1:]]) if several else first + leaf

    with ExitStack() as hooks:
        for row in sites:
            hook = network.layers[row].register_forward_hook(
                lambda _, args, options, result, row=row: nudge(row, args, options, result),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        with torch.enable_grad():
            loss = objective.loss(network.model(examples.x), examples.y)
            leaves = [seen[row][2] for row in sites]
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)

    def array(tensor: Tensor, site: Site) -> np.ndarray:
        first = tensor.detach().movedim(site.batch_axis, 0)
        return first.float().cpu().contiguous().numpy()

    found: dict[int, Probe] = {}
    for (row, site), gradient in zip(sites.items(), gradients, strict=True):
        assert not isinstance(site, str)
        inputs, outputs, _ = seen[row]
        found[row] = Probe(
            array(inputs, site), array(outputs, site), array(gradient, site), float(loss.detach())
        )
    return found

"""What a layer sees on some examples, and how the loss depends on what it gives."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.errors import InputError
from esper.tamiyo import Probe
from esper.tolaria._torch_data import Examples, Objective
from esper.tolaria._torch_network import TorchNetwork
from esper.tolaria._torch_survey import Site


def probe(
    network: TorchNetwork, objective: Objective, row: int, site: Site | str, examples: Examples
) -> Probe:
    """Input and output of a layer, and the gradient of the mean loss by that output.

    In evaluation mode, where nothing is drawn, counted or averaged, and in float32 whatever the
    run's precision. The gradient goes back to the layer and no further.

    Raises:
        InputError: for a layer that is not called once, with an axis for the batch.
    """
    layer = network.layers[row]
    if isinstance(site, str):
        raise InputError(
            f"layer {layer.layer_name!r} cannot be probed: {site}. Let kernels be grafted"
            " elsewhere, by `grow_at`, or take triggers and initialisations that need no probe"
        )
    seen: list[Tensor] = []

    def cut(module: Any, args: Any, options: Any, result: Any) -> Any:
        several = isinstance(result, tuple | list)
        given = result[0] if several else result
        # A leaf: what lies before the layer keeps nothing for a backward pass.
        leaf = given.detach().requires_grad_()
        seen.extend([args[0] if args else next(iter(options.values())), leaf])
        return type(result)([leaf, *result[1:]]) if several else leaf

    hook = layer.register_forward_hook(cut, with_kwargs=True)
    try:
        with torch.enable_grad():
            loss = objective.loss(network.model(examples.x), examples.y)
            inputs, outputs = seen
            (gradient,) = torch.autograd.grad(loss, [outputs])
    finally:
        hook.remove()

    def array(tensor: Tensor) -> np.ndarray:
        first = tensor.detach().movedim(site.batch_axis, 0)
        return first.float().cpu().contiguous().numpy()

    return Probe(array(inputs), array(outputs), array(gradient), float(loss.detach()))

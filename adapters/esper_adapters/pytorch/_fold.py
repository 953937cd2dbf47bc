"""An affine kernel, folded into the weights of its linear layer."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from esper_adapters._errors import tied_weights
from esper_adapters.pytorch._sharded import is_sharded
from esper_functional import Event, FoldError, advance, affine_of, apply_event, fold_linear

if TYPE_CHECKING:
    from esper_adapters.pytorch._layer import SeededLayer


def folded_weights(layer: "SeededLayer", event: Event) -> tuple[np.ndarray, np.ndarray | None]:
    """A layer's weights with a kernel folded into them; nothing is changed.

    Raises:
        FoldError: for a kernel that is not affine, another layer, or a blend that forbids it.
    """
    # Refused as the state refuses it, before anything is run.
    table = layer.seed_table
    apply_event(table.state, event, layers=table.names)
    where = f"layer {layer.layer_name!r}"
    held = getattr(layer, "weight", None)
    plain = isinstance(layer, nn.Linear) and type(layer)._esper_linear
    if not plain or not isinstance(held, nn.Parameter):
        raise FoldError(
            f"fold: {where} is not a linear layer, and only into those kernels can be folded:"
            " fossilise the kernel instead"
        )
    if type(held.data) is not torch.Tensor or is_sharded(layer):
        raise FoldError(
            f"fold: the weight of {where} is spread over processes, of which this one holds a part:"
            " fossilise the kernel instead, or fold when the model is whole again"
        )
    if layer._tied:
        raise tied_weights(layer.layer_name)
    if event.seed not in layer.running or not bool(layer.running[event.seed].working):
        raise FoldError(
            f"fold: seed {event.seed} of {where} has stopped at its third failure, so it has no"
            " part in the output that could be folded"
        )
    kernel, weight = layer.running[event.seed], layer.get_parameter("weight")
    name = str(weight.dtype).removeprefix("torch.")

    def evaluate(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            x = torch.as_tensor(rows).to(weight)
            return kernel.probe(x).double().cpu().numpy()

    called = kernel.kernel_id[:12] or "without an id"
    form = affine_of(evaluate, called, kernel.example_rank, weight.shape[1], name)
    bias = getattr(layer, "bias", None)
    state = advance(table.state, event.step)
    places = sorted(layer.running)
    return fold_linear(
        weight.detach().double().cpu().numpy(),
        None if bias is None else bias.detach().double().cpu().numpy(),
        form,
        layer.blend,
        np.asarray(state.alpha)[layer.row, places],
        places.index(event.seed),
    )


def take_weights(layer: nn.Module, weight: np.ndarray, bias: np.ndarray | None) -> None:
    """Give a linear layer other numbers."""
    with torch.no_grad():
        layer.get_parameter("weight").copy_(torch.as_tensor(weight))
        if bias is not None:
            layer.get_parameter("bias").copy_(torch.as_tensor(bias))

"""Losses of a network on a part of its task, with all of its kernels and without some."""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.tolaria._torch_data import Objective, TaskData
from esper.tolaria._torch_network import TorchNetwork
from esper.tolaria._trainee import Evaluation, Place, muted_state
from esper_adapters.pytorch import SeededLayer
from esper_functional import blend_weights, health_score, running


def evaluate(
    network: TorchNetwork, data: TaskData, objective: Objective, split: str, size: int | None
) -> Evaluation:
    """Loss, accuracy and health over a part, at most `size` examples at a time."""
    ranges: dict[Place, tuple[Tensor, Tensor]] = {}
    hooks = [
        kernel.register_forward_hook(_widen(ranges, place, network.layers[place[0]]))
        for place, kernel in network.running().items()
    ]
    rows: list[Tensor] = []
    counts: list[int] = []
    try:
        for x, y in data.chunks(split, size):
            outputs = network.model(x)
            rows.append(torch.stack([objective.loss(outputs, y), objective.accuracy(outputs, y)]))
            counts.append(len(y))
    finally:
        for hook in hooks:
            hook.remove()
    share = np.asarray(counts, np.float64) / sum(counts)
    loss, accuracy = share @ torch.stack(rows).cpu().numpy().astype(np.float64)
    # The score depends on each feature's range alone, so a part of any size is one batch.
    health = {
        place: float(health_score(torch.stack(own).cpu().numpy())) for place, own in ranges.items()
    }
    return Evaluation(float(loss), float(accuracy), health)


def _widen(
    ranges: dict[Place, tuple[Tensor, Tensor]], place: Place, layer: SeededLayer
) -> Callable[..., None]:
    """A hook that notes the least and the largest value of each of a kernel's features."""

    def note(kernel: Any, args: Any, result: tuple[Tensor, Any]) -> None:
        axis = -kernel.example_rank if layer.channels_first else -1
        features = result[0].detach().float().movedim(axis, -1)
        low, high = features.reshape(-1, features.shape[-1]).aminmax(dim=0)
        if place in ranges:
            before = ranges[place]
            low, high = torch.minimum(before[0], low), torch.maximum(before[1], high)
        ranges[place] = low, high

    return note


def losses_without(
    network: TorchNetwork,
    data: TaskData,
    objective: Objective,
    split: str,
    size: int | None,
    variants: Sequence[Collection[Place]],
) -> np.ndarray:
    """The loss of each example with the seeds of each variant at alpha 0.

    All variants in one pass: their blend weights are mapped over, so what lies before the first
    muted kernel is computed once, and no variant sees another, whatever mixes examples. A host or
    kernel that `torch.func.vmap` cannot map is run once for each variant.

    Args:
        size: most examples of all variants together in one pass.

    Returns:
        f32 `[variants, examples]`.
    """
    count, most = len(variants), data.count(split) * len(variants) if size is None else size
    together = max(1, min(count, most))
    examples = max(1, most // max(together, 1))
    blocks = [variants[i : i + together] for i in range(0, count, together)]
    return np.concatenate(
        [_block(network, data, objective, split, examples, block) for block in blocks]
        or [np.zeros((0, data.count(split)), np.float32)]
    )


def _block(
    network: TorchNetwork,
    data: TaskData,
    objective: Objective,
    split: str,
    examples: int,
    variants: Sequence[Collection[Place]],
) -> np.ndarray:
    weights = _variant_weights(network, variants)
    mapped: list[Tensor] = []
    try:
        for x, y in data.chunks(split, examples):
            outputs = _mapped_outputs(network, x, weights, len(variants))
            mapped.append(torch.stack([objective.losses(own, y) for own in outputs]))
    except Exception:  # whatever a module or a program raises that cannot be mapped
        # What is wrong in itself is raised by the loop.
        mapped = [_looped(network, data, objective, split, examples, own) for own in variants]
        return torch.stack(mapped).cpu().numpy()
    return torch.cat(mapped, 1).cpu().numpy()


def _looped(
    network: TorchNetwork,
    data: TaskData,
    objective: Objective,
    split: str,
    examples: int,
    variant: Collection[Place],
) -> Tensor:
    with network.muted(variant):
        return torch.cat(
            [objective.losses(network.model(x), y) for x, y in data.chunks(split, examples)]
        )


_Weights = dict[int, tuple[Tensor, tuple[Tensor, ...]]]
"""By layer row: the host's weights `[variants]`, and each blended kernel's."""


def _variant_weights(network: TorchNetwork, variants: Sequence[Collection[Place]]) -> _Weights:
    """The blend weights of every variant, of the layers in which any differs."""
    seeds = network.seeds
    alphas = np.stack([np.asarray(muted_state(seeds, own).alpha) for own in variants])
    blended = np.asarray(running(seeds) & ~seeds.incubating)
    found: _Weights = {}
    for row in sorted({row for own in variants for row, _ in own}):
        layer = network.layers[row]
        order = [seed for seed in layer.running if blended[row, seed]]
        if order:
            runs = np.broadcast_to(blended[row], alphas[:, row].shape)
            host, kernels = blend_weights(layer.blend, alphas[:, row], runs)
            on_device = torch.from_numpy(np.asarray(kernels)).to(network.device)
            own = tuple(on_device[:, seed].contiguous() for seed in order)
            found[row] = torch.from_numpy(np.asarray(host)).to(network.device), own
    return found


def _mapped_outputs(network: TorchNetwork, x: Tensor, weights: _Weights, count: int) -> Tensor:
    """The outputs of all variants, `[variants, n, ...]`, by one call of the host."""
    if not weights:
        # No variant mutes a kernel that is blended, so they are all the same.
        outputs = network.model(x)
        return outputs.unsqueeze(0).expand(count, *outputs.shape)

    def run(own: _Weights) -> Tensor:
        for row, (host, kernels) in own.items():
            layer = network.layers[row]
            live = layer.live_at(network.seeds)
            assert live is not None
            layer.show(live._replace(host_weight=host, weights=kernels))
        return network.model(x)

    try:
        with warnings.catch_warnings():
            # What has no rule for it is done one after the other within the pass.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(run, randomness="same")(weights)
    finally:
        for row in weights:
            network.layers[row].show_state()

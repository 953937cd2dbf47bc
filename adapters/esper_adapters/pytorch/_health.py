"""Health of kernels, measured on the device in the forward passes of sampled steps.

What the core measures with jax, in torch's own operations; one small array crosses to the host.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from esper_adapters.pytorch._table import SeedTable
from esper_functional import (
    DEAD_BELOW,
    STATISTICS,
    Event,
    EventKind,
    observe_statistics,
    running_seeds,
)

if TYPE_CHECKING:
    from esper_adapters.pytorch._layer import SeededLayer


class HealthSample:
    """What was measured of each kernel, by (row, seed): f32 `[4]` on the device."""

    def __init__(self) -> None:
        self.measured: dict[tuple[int, int], Tensor] = {}


def measure_outputs(k: Tensor, *, feature_axis: int = -1) -> Tensor:
    """`esper_functional.STATISTICS` of a kernel's outputs: f32 `[4]`, on their device.

    Args:
        k: `[*batch, features]`, or with the features at another axis.
    """
    rows = k.detach().movedim(feature_axis, -1)
    rows = rows.reshape(-1, rows.shape[-1]).float()
    spread = rows.amax(0) - rows.amin(0)
    still = spread < DEAD_BELOW * rows.abs().amax(0).clamp(min=1.0)
    dead = still.float().mean()
    health = torch.where(torch.isfinite(rows).all(), 1.0 - dead, torch.nan)
    centred = rows - rows.mean(0)
    deviation = rows.std(0, correction=0)
    unit = torch.where(still, 0.0, centred / torch.where(still, 1.0, deviation))
    correlation = (unit.T @ unit).abs() / len(rows)
    features = rows.shape[1]
    off_diagonal = (correlation.sum() - correlation.diagonal().sum()) / max(
        features * (features - 1), 1
    )
    variance = rows.var(0, correction=0).mean()
    return torch.stack([health, variance, dead, off_diagonal])


@contextlib.contextmanager
def sample_health(layers: Sequence["SeededLayer"]) -> Iterator[HealthSample]:
    """Measure the kernels of some layers in the forward passes within."""
    sample = HealthSample()
    hooks = []

    def watch(place: tuple[int, int], channels_first: bool, rank: int) -> Any:
        axis = -rank if channels_first else -1

        def measure(module: Any, args: Any, result: tuple[Tensor, Any]) -> None:
            if result[0].dim() >= 1 and result[0].numel():
                with torch.no_grad():
                    sample.measured[place] = measure_outputs(result[0], feature_axis=axis)

        return measure

    for layer in layers:
        if layer.telemetry_enabled:
            for seed, kernel in layer.running.items():
                place = (layer.row, seed)
                watcher = watch(place, layer.channels_first, kernel.example_rank)
                hooks.append(kernel.register_forward_hook(watcher))
    try:
        yield sample
    finally:
        for hook in hooks:
            hook.remove()


def observe_sample(
    table: SeedTable, layers: Sequence["SeededLayer"], sample: HealthSample, step: int
) -> list[Event]:
    """Take a sample into the averages; one transfer for the whole model."""
    with table.lock:
        places = running_seeds(table.state)
        measured = np.full((len(places), len(STATISTICS)), np.nan, np.float32)
        seen = [place for place in places if place in sample.measured]
        if seen:
            rows = torch.stack([sample.measured[place] for place in seen]).cpu().numpy()
            measured[[places.index(place) for place in seen]] = rows
        if table.replicas is not None:
            measured = table.replicas.mean_of_measured(measured, list(map(places.index, seen)))
        _, table.statistics = observe_statistics(table.state, table.statistics, measured, step=step)
        events = [
            Event(step, row, seed, EventKind.HEALTH, value=float(score))
            for (row, seed), score in zip(places, measured[:, 0], strict=True)
            if np.isfinite(score)
        ]
        for event in events:
            table.apply(event)
    return events

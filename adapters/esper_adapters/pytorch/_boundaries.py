"""What happens to all layers of a model at boundaries: ramps advance, failures are absorbed."""

from collections.abc import Sequence

import numpy as np
import torch

from esper_adapters.pytorch._layer import SeededLayer
from esper_adapters.pytorch._table import SeedTable
from esper_functional import Event, fault_events


def advance_layers(table: SeedTable, layers: Sequence[SeededLayer], step: int) -> bool:
    """Bring all ramps to `step`; returns whether any layer's alphas moved.

    An event on one layer brings the ramps of all to its step, so what is compared is
    what each layer shows, not whether a ramp is under way.
    """
    with table.lock:
        table.advance(step)
        stale = (np.asarray(table.state.alpha) != table.shown).any(axis=1)
        for layer in layers:
            if stale[layer.row]:
                layer.refresh_alpha()
        return bool(stale.any())


def absorb_faults(table: SeedTable, layers: Sequence[SeededLayer], step: int) -> list[Event]:
    """Bring the failure counts of all layers into the seed state.

    One transfer for the whole model; waits for the device, so it is called at
    decision boundaries and never in a step.
    """
    with table.lock:
        on_device = [kernel.errors for layer in layers for kernel in layer.running.values()]
        if not on_device:
            return []
        counts = torch.stack(on_device)
        if table.replicas is not None:
            counts = table.replicas.largest(counts)
        counts = counts.cpu().numpy()
        events = fault_events(table.state, counts, step=step)
        for event in events:
            table.apply(event)
        if events:
            for layer in layers:
                layer.refresh()
    return events

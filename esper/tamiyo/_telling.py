"""From what a run's controller reads to the report that it sends elsewhere."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from esper.contracts import KernelRecord, ModelReport
from esper.tamiyo._controller import Observation
from esper.tamiyo.graph import Readings, Topology


def report_of(
    observation: Observation,
    topology: Topology,
    readings: Readings,
    kernel: Callable[[int, int], KernelRecord],
) -> ModelReport:
    """A model's report; whoever reads it gets the same `Readings` back.

    Args:
        observation: of the boundary, on whose sites, costs and rollbacks rules of safety look.
        topology: of the model.
        readings: in numpy; rows beyond the topology's nodes are left out.
        kernel: which kernel a graft of a row of `readings.kernels` would take in a layer row, as
            `ReadingsRecorder.kernel` says; it is asked about what fits.
    """
    count = len(topology.nodes)
    table = _Table()
    described = np.asarray(readings.kernels)
    # Rows of 0 fill up.
    rows = [row for row in range(len(described)) if described[row].any()]
    order = [table.row(described[row]) for row in rows]
    held = [
        [table.row(own) if own.any() else None for own in site]
        for site in np.asarray(readings.held)[:count]
    ]
    records: dict[str, tuple[int, KernelRecord]] = {}
    fits = np.asarray(readings.fits)

    def taken(layer: int, row: int) -> int | None:
        if not fits[layer, row]:
            return None
        record = kernel(row, layer)
        return records.setdefault(record.kernel_id, (len(records), record))[0]

    found = [{table_row: taken(layer, row) for table_row, row in zip(order, rows, strict=True)}
             for layer in range(count)]  # fmt: skip
    sizes = np.asarray(readings.sizes)[:count].astype(np.int64).tolist()
    by_seed = {
        name: _nested(getattr(readings, name)[:count])
        for name in ("alpha", "health", "health_before", "worth", "worth_half")
    }
    return ModelReport(
        step=observation.step,
        steps=observation.steps,
        sites=tuple(topology.sites),
        kinds=tuple(node.kind for node in topology.nodes),  # pyright: ignore[reportArgumentType]
        depths=tuple(topology.depths.tolist()),
        senders=tuple(topology.senders.tolist()),
        receivers=tuple(topology.receivers.tolist()),
        site_parameters=tuple(row[0] for row in sizes),
        site_inputs=tuple(row[1] for row in sizes),
        site_outputs=tuple(row[2] for row in sizes),
        grows=tuple(np.asarray(readings.grows)[:count].tolist()),
        train_loss=_losses(readings.train_loss),
        validation_loss=_losses(readings.validation_loss),
        validation_accuracy=_finite(float(readings.validation_accuracy)),
        first_loss=_finite(float(readings.first_loss)),
        loss_spread=_finite(float(readings.loss_spread)),
        rollbacks=tuple(observation.rollbacks),
        host_parameters=observation.host.parameters,
        host_flops=float(observation.host.flops),
        parameters=observation.now.parameters,
        flops=float(observation.now.flops),
        gradient_norm=_nested(readings.gradient_norm[:count]),
        weight_norm=_nested(readings.weight_norm[:count]),
        follows=_nested(readings.follows[:count]),
        stage=_nested(readings.stage[:count]),
        age=_nested(np.asarray(readings.age)[:count], int),
        held=tuple(map(tuple, held)),
        descriptions=tuple(table.rows),
        fits=tuple(
            tuple(own.get(row) for row in range(len(table.rows))) for own in found
        ),
        kernel_ids=tuple(records),
        kernel_parameters=tuple(record.parameter_count for _, record in records.values()),
        kernel_flops=tuple(record.flops for _, record in records.values()),
        **by_seed,
    )  # fmt: skip


class _Table:
    """Rows, each once."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []
        self._known: dict[bytes, int] = {}

    def row(self, numbers: np.ndarray) -> int:
        key = np.ascontiguousarray(numbers, np.float32).tobytes()
        if key not in self._known:
            self._known[key] = len(self.rows)
            self.rows.append(tuple(float(own) for own in numbers))
        return self._known[key]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _losses(losses: Any) -> tuple[float | None, ...]:
    found = _nested(losses)
    # What was before the run began is left out, but for one.
    while len(found) > 1 and found[-1] is None:
        found = found[:-1]
    return found


def _nested(values: Any, kind: Callable[[Any], Any] | None = None) -> Any:
    """Nested tuples of an array's numbers; None for what is not finite."""
    array = np.asarray(values)

    def told(item: Any) -> Any:
        if isinstance(item, list):
            return tuple(map(told, item))
        if isinstance(item, float) and not math.isfinite(item):
            return None
        return item if kind is None else kind(item)

    return told(array.tolist())

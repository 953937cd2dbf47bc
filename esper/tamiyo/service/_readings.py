"""From what a model reports to what a policy reads."""

import functools

import numpy as np

from esper.errors import InputError
from esper.tamiyo._offers import LEAST_OFFERS
from esper.tamiyo.graph import (
    FOLLOWED,
    KERNEL,
    KINDS,
    PAST,
    Edges,
    Node,
    Readings,
    Topology,
    bucket,
)
from esper.tamiyo.graph import pad_topology as padded
from esper.tamiyo.service._advisor import News
from esper.tamiyo.service._report import Report, numbers

_KIND_ROWS = {kind: row for row, kind in enumerate(KINDS)}


def edges_of(report: Report) -> Edges:
    """The edges of a model, filled up to buckets."""
    data = report.data
    # What feeds itself is no edge of a topology, whose pairs are sorted.
    pairs = sorted(
        {pair for pair in zip(data.senders, data.receivers, strict=True) if pair[0] != pair[1]}
    )
    ends = np.array(pairs, np.int32).reshape(-1, 2)
    nodes = tuple(
        Node(name, kind, (), (), parameters)
        for name, kind, parameters in zip(data.sites, data.kinds, data.site_parameters, strict=True)
    )
    depths = np.array(data.depths, np.int32)
    return padded(Topology(nodes, ends[:, 0].copy(), ends[:, 1].copy(), depths))


def readings_of(news: News, nodes: int) -> Readings:
    """What a policy reads of a model's newest report, with its seeds as they were seen since.

    Kernels are filled up to a bucket.

    Args:
        nodes: rows to fill up to, as `edges_of` has them.

    Raises:
        InputError: for a report of which kernels are described by another number of numbers.
    """
    data, seeds = news.report.data, news.seeds
    width = len(data.descriptions[0]) if data.descriptions else KERNEL
    if width != KERNEL:
        raise InputError(
            f"{news.model[:80]!r} describes kernels by {width} numbers, and policies here read"
            f" {KERNEL}: run the same version of Esper on both sides"
        )
    fill = functools.partial(_filled, rows=nodes)
    unknown = functools.partial(_filled, rows=nodes, filling=np.nan)
    rows = bucket(len(data.descriptions), LEAST_OFFERS)
    kernels = _filled(numbers(data.descriptions).reshape(-1, KERNEL), rows)
    fits = np.zeros((nodes, rows), np.bool_)
    for site, own in enumerate(data.fits):
        fits[site, : len(own)] = [index is not None for index in own]
    # A row that there is not, for seeds without a kernel.
    described = np.concatenate([kernels, np.zeros((1, KERNEL), np.float32)])
    held = np.array([[-1 if own is None else own for own in row] for row in data.held], np.int64)
    columns = data.site_parameters, data.site_inputs, data.site_outputs
    return Readings(
        progress=np.float32(data.step / data.steps),
        train_loss=_past(data.train_loss),
        validation_loss=_past(data.validation_loss),
        validation_accuracy=_one(data.validation_accuracy),
        first_loss=_one(data.first_loss),
        loss_spread=_one(data.loss_spread),
        rollbacks=np.float32(len(data.rollbacks)),
        parameters=_one(data.parameters / max(1, data.host_parameters)),
        flops=_one(data.flops / max(1.0, data.host_flops)),
        kind=fill(np.array([_KIND_ROWS[kind] for kind in data.kinds], np.int32)),
        sizes=fill(np.array(columns, np.float32).T),
        depth=fill(np.array(data.depths, np.float32)),
        grows=fill(np.array(data.grows, np.bool_)),
        gradient_norm=fill(numbers(data.gradient_norm)),
        weight_norm=fill(numbers(data.weight_norm)),
        follows=unknown(numbers(data.follows).reshape(-1, len(FOLLOWED))),
        stage=fill(np.asarray(seeds.stage)),
        alpha=fill(np.asarray(seeds.alpha)),
        health=unknown(np.asarray(seeds.health)),
        health_before=unknown(numbers(data.health_before)),
        worth=unknown(numbers(data.worth)),
        worth_half=unknown(numbers(data.worth_half)),
        age=fill(np.array(data.age, np.float32)),
        held=fill(described[held]),
        kernels=kernels,
        fits=fits,
    )


def _filled(values: np.ndarray, rows: int, filling: float = 0.0) -> np.ndarray:
    filled = np.full((rows, *values.shape[1:]), filling, values.dtype)
    filled[: len(values)] = values
    return filled


def _past(losses: tuple[float | None, ...]) -> np.ndarray:
    known = numbers(losses[:PAST])
    return np.concatenate([known, np.full(PAST - len(known), np.nan, np.float32)])


def _one(value: float | None) -> np.float32:
    return np.float32(numbers([value])[0])

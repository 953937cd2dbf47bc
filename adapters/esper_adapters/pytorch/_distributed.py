"""Decisions of one process, carried out by all: at the same step, and by all or by none."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from esper_adapters._naming import step_reached
from esper_adapters.pytorch._fold import folded_weights
from esper_adapters.pytorch._kernel import TorchKernel
from esper_adapters.pytorch._model import MorphableModel, check_wrapped
from esper_adapters.pytorch._replicas import (
    by_rank,
    check_group,
    described,
    gather,
    structure_of,
)
from esper_functional import (
    Event,
    EventKind,
    FoldError,
    KasminaException,
    apply_event,
    state_digest,
)


def share_events(
    model: MorphableModel, events: Iterable[Event] = (), *, source: int = 0, group: Any = None
) -> list[Event]:
    """Apply the events that one rank has decided on all ranks, before the same step.

    Collective; where there are none it costs one broadcast, so that it can be called in every step.
    What other ranks give as events is not looked at. Each rank finds the kernels of
    ACTIVATE by their ids, by `resolve` or the library, and tries all events on the seeds' state;
    only where all ranks can take all of them is anything changed.

    Args:
        model: under `DistributedDataParallel`, its `module`.
        events: with the steps that they are for.
        source: the rank, within the group, whose events they are.
        group: the processes, of `torch.distributed`; those of `replicate_kernels` by default, or
            all.

    Returns:
        The events, on every rank.

    Raises:
        KasminaException: on all ranks, where any rank cannot take them: it names the ranks and
            their reasons. Nothing is changed anywhere.
    """
    check_group("share_events")
    replicas = model.seed_table.replicas if isinstance(model, MorphableModel) else None
    if group is None and replicas is not None:
        group = replicas.group
    shared: list[Any] = [None]
    error: Exception | None = None
    # Whatever a rank finds wrong, the others must not wait for it: it is told, and then raised.
    if dist.get_rank(group) == source:
        try:
            shared = [[_written(event) for event in events]]
        except Exception as raised:
            error = raised
    dist.broadcast_object_list(shared, group=group, group_src=source)
    if shared[0] == []:
        return []
    found: list[Event] = []
    kernels: list[TorchKernel | None] = []
    own: Any = None
    try:
        found = list(map(_read, shared[0] or ()))
        kernels = _tried(model, found)
        held = [kernel and structure_of(kernel) for kernel in kernels]
        own = (model.seed_table.step, state_digest(model.seeds), held)
    except Exception as raised:
        error = error or raised
    reasons, states = zip(*gather((described(error), own), group), strict=True)
    if any(reasons):
        raise KasminaException(
            f"share_events: nothing is changed on any rank: {by_rank(reasons)}"
        ) from error
    unlike = [rank for rank, state in enumerate(states) if state != states[source]]
    if unlike:
        raise KasminaException(
            "share_events: nothing is changed on any rank: step, seeds or kernels of ranks"
            f" {unlike} are not those of rank {source}: a change was made there alone, or not"
            " there, or one id stands for two kernels"
        )
    for event, kernel in zip(found, kernels, strict=True):
        model.apply_event(event, kernel)
    return found


def _written(event: Event) -> tuple[Any, ...]:
    if not isinstance(event, Event):
        raise TypeError(f"events are esper_functional.Event; got {type(event).__name__}")
    where = (int(event.step), int(event.layer), int(event.seed))
    return (*where, str(event.kind), event.kernel_id, event.value, int(event.span), event.shape)


def _read(fields: tuple[Any, ...]) -> Event:
    step, layer, seed, kind, *more = fields
    return Event(step, layer, seed, EventKind(kind), *more)


def _tried(model: MorphableModel, events: Iterable[Event]) -> list[TorchKernel | None]:
    """The kernels that events graft, after trying all events; nothing is changed."""
    check_wrapped("share_events", model)
    table = model.seed_table
    state, step = table.state, table.step
    kernels: list[TorchKernel | None] = []
    touched: set[int] = set()
    for event in events:
        step = step_reached(event.step, step)
        state = apply_event(state, event, layers=table.names)
        layer = model.layer_of(event.layer)
        kernel: TorchKernel | None = None
        if event.kind is EventKind.ACTIVATE:
            kernel = table.fetch(event.kernel_id)
            layer.check_kernel(kernel)
        if event.kind is EventKind.FOLD:
            if event.layer in touched:
                raise FoldError(
                    f"fold: an event before it changes layer {layer.layer_name!r} too, so that it"
                    " cannot be tried before: share it by itself"
                )
            folded_weights(layer, event)
        touched.add(event.layer)
        kernels.append(kernel)
    return kernels

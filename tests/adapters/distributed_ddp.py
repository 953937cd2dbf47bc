"""Scenarios under DistributedDataParallel: each returns what a rank saw.

What stands under "alike" must be equal on all ranks, bit by bit.
"""

import asyncio
import copy
import pickle
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esper_adapters.pytorch import (
    TorchKernel,
    carry_optimizer,
    kernel_from_module,
    replicate_kernels,
    share_events,
    unwrap,
    wrap,
)
from esper_functional import Event, EventKind, state_digest
from tests.adapters.distributed import (
    AFFINE,
    BAD,
    BATCH,
    TANH,
    TWO,
    Call,
    X,
    digest,
    gap,
    host,
    life,
    own,
    rank,
    refusal,
    resolve,
    shared,
    small,
    step,
    weights,
    wide,
    wrapped,
)


def parallel(model: Any, **options: Any) -> DistributedDataParallel:
    replicate_kernels(model)
    return DistributedDataParallel(model, **options)


def ddp_life() -> dict[str, Any]:
    ddp = parallel(wrapped())
    # The kernel that is at hand was drawn anew on each rank: the first rank's is taken.
    seen = life(ddp.module, ddp, split=True, first=small(seed=rank()))
    alone = wrapped()
    life(alone, alone, split=False)
    return {
        "alike": seen,
        "whole batch": gap(weights(ddp.module), weights(alone)),
        "states": state_digest(ddp.module.seeds) == state_digest(alone.seeds),
    }


def ddp_dormant() -> dict[str, Any]:
    bare, model = DistributedDataParallel(host()), parallel(wrapped())
    losses = []
    for net in (bare, model):
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        losses.append([step(net, optimizer, now, split=True) for now in range(3)])
    same = digest(bare.module) == digest(model.module) and losses[0] == losses[1]
    return {"alike": digest(model.module), "bitwise": same}


def ddp_decisions() -> dict[str, Any]:
    ddp = parallel(wrapped())
    told: list[Event] = []
    ddp.module.seed_table.listeners.append(told.append)
    seen = shared(ddp.module, ddp)
    told_all = [str(e) for e in told] == [e for own in seen for e in own[0]]
    return {"alike": seen, "told": told_all, "events": sum(len(own[0]) for own in seen)}


def ddp_refusals() -> dict[str, Any]:
    """What one rank cannot do none does, and training goes on."""

    def unknown(kernel_id: str) -> TorchKernel:
        if rank() == 1 and kernel_id == TANH:
            raise LookupError("no such kernel on this disk")
        if rank() == 1 and kernel_id == BAD:
            raise OSError("the disk is broken")
        if kernel_id == TWO:
            return wide(3 + rank())
        misfit = kernel_from_module(nn.Linear(3, 3), kernel_id=AFFINE)
        return misfit if rank() == 1 and kernel_id == AFFINE else resolve(kernel_id)

    ddp = parallel(wrapped(unknown))
    model = ddp.module
    model.load_kernel_sync("2", 0, kernel_from_module(nn.Linear(6, 2)), alpha=0.4)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)

    def graft(kernel_id: str, now: int = 0) -> list[Event]:
        own = (EventKind.LOAD, EventKind.ACTIVATE)
        return [Event(now, 0, 0, kind, kernel_id) for kind in own]

    fold = [Event(0, 1, 0, EventKind.ALPHA, value=0.5), Event(0, 1, 0, EventKind.FOLD)]
    other = kernel_from_module(nn.Linear(4, 6, bias=rank() == 0))
    cases: dict[str, Call] = {
        "unknown": lambda: share_events(model, graft(TANH)),
        "unreadable": lambda: share_events(model, graft(BAD)),
        "misfit": lambda: share_events(model, graft(AFFINE)),
        "two of an id": lambda: share_events(model, graft(TWO)),
        "not found": lambda: share_events(model, graft("d" * 64)),
        "illegal": lambda: share_events(model, [Event(0, 0, 0, EventKind.UNLOAD)]),
        "not there": lambda: share_events(model, [Event(0, 5, 0, EventKind.LOAD)]),
        "over": lambda: share_events(model, [*graft(TANH, 3)[:1], Event(1, 0, 0, EventKind.FAIL)]),
        "no event": lambda: share_events(model, ["load"]),  # pyright: ignore[reportArgumentType]
        "no events": lambda: share_events(model, 3),  # pyright: ignore[reportArgumentType]
        "fold": lambda: share_events(model, fold),
        "not wrapped": lambda: share_events(ddp, graft(TANH)),  # pyright: ignore[reportArgumentType]
        "replicate what is not wrapped": lambda: replicate_kernels(ddp),  # pyright: ignore[reportArgumentType]
        "unlike": lambda: model.load_kernel_sync("0", 0, other),
        "thread": lambda: asyncio.run(model.load_kernel("0", 0, small())),
        "ddp alone": lambda: DistributedDataParallel(wrapped()),
    }
    found = {}
    for name, case in cases.items():
        before = state_digest(model.seeds), digest(model)
        message = refusal(case)
        found[name] = [message, (state_digest(model.seeds), digest(model)) == before]
        step(model, optimizer, 0, split=True, forward=ddp)
    return {"alike": found, "weights": digest(model)}


def ddp_loads() -> dict[str, Any]:
    """`load_kernel_sync` by an id, where one rank cannot find or read the kernel."""

    def find(kernel_id: str) -> TorchKernel:
        if rank() == 1 and kernel_id == TANH:
            raise LookupError("no such kernel on this disk")
        if rank() == 1 and kernel_id == BAD:
            raise OSError("the disk is broken")
        return resolve(kernel_id)

    model = parallel(wrapped(find)).module
    absent = model.load_kernel_sync("0", 0, TANH)
    broken = refusal(lambda: model.load_kernel_sync("0", 1, BAD))
    there = model.load_kernel_sync("2", 0, kernel_from_module(nn.Linear(6, 2)))
    stages = model.seeds.stage.tolist()
    return {"alike": [absent, broken, there, stages, digest(model)]}


def ddp_faults() -> dict[str, Any]:
    """A kernel that fails on one rank at a time fails as in one process."""
    results, events = [], []
    for split in (True, False):
        model = wrapped()
        forward = parallel(model) if split else model
        model.load_kernel_sync("0", 0, BAD, alpha=0.5)
        model.load_kernel_sync("0", 1, TANH, alpha=0.5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        seen = []
        # The example that fails is rank 0's, rank 1's or nobody's.
        for now, bad in enumerate([0, BATCH - 1, None, 1, BATCH - 2, 0, None]):
            x = X[now].abs()
            if bad is not None:
                x[bad, 0] = -1.0
            optimizer.zero_grad()
            forward(own(x) if split else x).square().mean().backward()
            optimizer.step()
            kernel = model[0].kernel(0)
            seen.append([int(kernel.errors), bool(kernel.working), int(model[0].kernel(1).errors)])
            if now == 4:
                seen.append([str(event) for event in model.absorb(now)])
        seen.append([str(event) for event in model.absorb(6)])
        seen.append([state_digest(model.seeds), model.seeds.stage.tolist()])
        results.append(seen)
        if split:
            events = [seen, digest(model)]
    return {"alike": events, "as alone": results[0] == results[1], "seen": results[0]}


class Skipping(nn.Module):
    """Two layers, of which the second is skipped where it is told so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, skip: bool) -> torch.Tensor:
        h = self.first(x)
        return h if skip else self.second(h)


def ddp_unreached() -> dict[str, Any]:
    """A kernel that some ranks do not reach, or none, holds nobody up."""
    model = wrap(Skipping(), seeds_per_layer=1, blend="residual")
    ddp = parallel(model, find_unused_parameters=True)
    torch.manual_seed(0)
    model.load_kernel_sync("second", 0, kernel_from_module(nn.Linear(6, 6)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen, kernel, mean, alone = [], model.second.kernel(0), False, model
    for now, skipping in enumerate([(), (1,), (0,), (0, 1)]):
        optimizer.zero_grad()
        ddp(own(X[now]), rank() in skipping).square().mean().backward()
        grads = [p.grad is None for p in kernel.parameters()]
        if now == 1:
            alone(X[now].chunk(2)[0], False).square().mean().backward()
            halved = {n: p.grad / 2 for n, p in alone.second.kernel(0).named_parameters()}
            mean = gap({n: p.grad for n, p in kernel.named_parameters()}, halved)
        optimizer.step()
        alone = copy.deepcopy(model)
        alone.zero_grad()
        seen.append([grads, digest(model)])
    return {"alike": seen, "none": [grads for grads, _ in seen], "mean": mean}


def ddp_accumulation() -> dict[str, Any]:
    """Gradients of two passes, the first without DDP's own reduction."""
    ddp, alone = parallel(wrapped()), wrapped()
    grads = []
    for model, forward, split in ((ddp.module, ddp, True), (alone, alone, False)):
        model.load_kernel_sync("0", 0, small(), alpha=0.5)

        def backward(now: int, forward: Any = forward, split: bool = split) -> None:
            x = own(X[now]) if split else X[now]
            forward(x).square().mean().backward()

        if split:
            with ddp.no_sync():
                backward(0)
        else:
            backward(0)
        backward(1)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    return {"whole batch": gap(*grads), "alike": [g.tolist() for g in grads[0].values()]}


def ddp_resumes() -> dict[str, Any]:
    """A grown model from its state_dict, wrapped by DDP with its kernels, which go later."""
    ddp = parallel(wrapped())
    optimizer = torch.optim.Adam(ddp.parameters(), 1e-2)
    ddp.module.load_kernel_sync("0", 0, TANH, alpha=0.2)
    ddp.module.ramp_seed_alpha("0", 0, 1.0, 9)
    carry_optimizer(optimizer, ddp.module)
    step(ddp, optimizer, 0, split=True)
    resumed = []
    for late in (False, True):
        again = wrapped()
        if late:
            # Into a model that DDP has already: its kernels come by load_state_dict.
            other = parallel(again)
            again.load_state_dict(ddp.module.state_dict(), assign=False)
        else:
            again.load_state_dict(ddp.module.state_dict())
            other = parallel(again)
        optimizer = torch.optim.Adam(other.parameters(), 1e-2)
        for now in range(1, 3):
            again.advance(now)
            step(other, optimizer, now, split=True)
        again.unload_kernel_sync("0", 0)
        carry_optimizer(optimizer, again)
        step(other, optimizer, 3, split=True)
        resumed.append([state_digest(again.seeds), digest(again)])
    return {"alike": resumed, "both ways": resumed[0] == resumed[1]}


def ddp_incubates() -> dict[str, Any]:
    ddp, alone = parallel(wrapped()), wrapped()
    for model, forward, split in ((ddp.module, ddp, True), (alone, alone, False)):
        model.load_kernel_sync("0", 0, TANH, alpha=0.0)
        model.incubate("0", 0)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for now in range(3):
            x = own(X[now]) if split else X[now]
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            for shadow in model.shadow_forward(x):
                shadow.square().mean().backward()
            optimizer.step()
    return {
        "alike": digest(ddp.module),
        "whole batch": gap(weights(ddp.module), weights(alone)),
    }


def ddp_health() -> dict[str, Any]:
    """Samples are averaged over those ranks that have measured a kernel."""
    model = parallel(wrapped()).module
    model.load_kernel_sync("0", 0, TANH, alpha=0.5)
    model.load_kernel_sync("2", 0, kernel_from_module(nn.Linear(6, 2)), alpha=0.5)
    with model.health_sample() as sample:
        model(own(X[0]))
    theirs = [float(v[0]) for v in sample.measured.values()]
    if rank() == 1:
        del sample.measured[1, 0]
        sample.measured[0, 0][0] = 0.5
    events = model.observe_health(sample, step=4)
    mean = np.asarray(model.seed_table.statistics.variance)[0, 0]
    return {
        "alike": [[str(e) for e in events], state_digest(model.seeds), float(mean)],
        "scores": [e.value for e in events],
        "own": theirs,
    }


def ddp_differing() -> dict[str, Any]:
    """What was changed on one rank alone is found out at the next boundary."""
    model = parallel(wrapped()).module
    model.load_kernel_sync("0", 0, TANH, alpha=0.5)
    if rank() == 1:
        model.set_seed_alpha("0", 0, 0.7)
    return {
        "alike": [
            refusal(model.absorb),
            refusal(lambda: share_events(model, [Event(0, 0, 0, EventKind.UNLOAD)])),
            refusal(lambda: replicate_kernels(model)),
        ]
    }


def ddp_counts() -> dict[str, Any]:
    """Failures in passes that nobody derives are each rank's own until they are absorbed."""
    ddp = parallel(wrapped())
    model = ddp.module
    model.load_kernel_sync("0", 0, BAD, alpha=0.5)
    x = own(X[0]).abs() * (-1 if rank() else 1)
    for _ in range(2):
        with torch.no_grad():
            ddp(x)
    counts = int(model[0].kernel(0).errors)
    events = [str(event) for event in model.absorb(1)]
    return {"alike": [events, state_digest(model.seeds)], "counts": counts, "events": len(events)}


def ddp_copies() -> dict[str, Any]:
    """A copy is nobody's replica, and what it does concerns one rank."""
    model = parallel(wrapped()).module
    model.load_kernel_sync("0", 0, AFFINE, alpha=0.5)
    host = unwrap(model)
    copied, kept = copy.deepcopy(model), pickle.dumps(model.seed_table)
    if rank() == 0:
        copied(X[0]).square().mean().backward()
        copied.absorb(3)
        copied.fold("0", 0)
    return {"alike": [digest(model), digest(host)], "alone": pickle.loads(kept).replicas is None}


def ddp_compiled() -> dict[str, Any]:
    """The same under torch.compile."""
    models = []
    for compiles in (True, False):
        ddp = parallel(wrapped())
        ddp.module.load_kernel_sync("0", 0, TANH, alpha=0.5)
        run = torch.compile(ddp, backend="aot_eager") if compiles else ddp
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
        for now in range(3):
            step(run, optimizer, now, split=True)
        models.append(ddp.module)
    return {"alike": digest(models[0]), "eager": gap(weights(models[0]), weights(models[1]))}


def ddp_alone() -> dict[str, Any]:
    """A rank that changes seeds alone waits for the others no longer than it was told to."""
    model = wrapped()
    replicate_kernels(model, timeout=timedelta(seconds=1))
    waited = refusal(lambda: model.load_kernel_sync("0", 0, small())) if rank() == 0 else "no"
    dist.barrier()
    return {"alike": "", "waited": waited}


SCENARIOS = {name: call for name, call in list(globals().items()) if name.startswith("ddp_")}

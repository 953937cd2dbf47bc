"""What the scenarios of several processes share: models, batches, and what becomes of them."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from esper_adapters.pytorch import (
    TorchKernel,
    carry_optimizer,
    kernel_from_module,
    share_events,
    wrap,
)
from esper_functional import Event, EventKind, difference, state_digest

BATCH, STEPS = 8, 12
RANDOM = np.random.default_rng(0)
X, Y = (
    torch.tensor(RANDOM.normal(size=(STEPS, BATCH, size)), dtype=torch.float32) for size in (4, 2)
)
TANH, AFFINE, BAD, TWO = "a" * 64, "b" * 64, "c" * 64, "e" * 64
Call = Callable[[], Any]


def rank() -> int:
    return dist.get_rank()


def own(batch: torch.Tensor) -> torch.Tensor:
    """This rank's share of a batch."""
    return batch.chunk(dist.get_world_size())[rank()]


def host(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def small(seed: int = 0) -> TorchKernel:
    return wide(3, TANH, seed)


def wide(width: int, kernel_id: str = TWO, seed: int = 0) -> TorchKernel:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 6))
    return kernel_from_module(module, kernel_id=kernel_id)


def affine() -> TorchKernel:
    torch.manual_seed(2)
    return kernel_from_module(nn.Linear(4, 6), kernel_id=AFFINE)


def root() -> TorchKernel:
    """NaN for each example whose first number is negative."""

    def program(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x[..., :1]) * w

    return TorchKernel(BAD, program, {"w": torch.ones(6)}, input_shape=(4,), output_shape=(6,))


def resolve(kernel_id: str) -> TorchKernel:
    return {TANH: small(), AFFINE: affine(), BAD: root()}[kernel_id]


def wrapped(find: Any = resolve, **options: Any) -> Any:
    return wrap(host(), seeds_per_layer=2, blend="residual", resolve=find, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p).clone() for name, p in model.named_parameters()}


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, p in weights(model).items():
        found.update(name.encode() + p.numpy().tobytes())
    return found.hexdigest()


def step(model: Any, optimizer: Any, now: int, *, split: bool, forward: Any = None) -> float:
    """A step of training, on this rank's share of the batch or on all of it."""
    x, y = (own(X[now]), own(Y[now])) if split else (X[now], Y[now])
    optimizer.zero_grad()
    loss = ((forward or model)(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def life(
    model: Any, forward: Any, *, split: bool, first: Any = None, folds: bool = True
) -> list[Any]:
    """Two kernels from load to their ends; every step's seeds and weights."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, foreach=True)
    seen: list[Any] = []
    for now in range(STEPS):
        changed = True
        if now == 1:
            model.load_kernel_sync("0", 0, first or small(), alpha=0.0, step=now)
            model.ramp_seed_alpha("0", 0, 1.0, 4)
        elif now == 3:
            assert model.load_kernel_sync("0", 1, AFFINE, alpha=0.3, step=now)
        elif now == 7:
            model.fossilize("0", 0, step=now)
        elif now == 9:
            (model.fold if folds else model.unload_kernel_sync)("0", 1, step=now)
        else:
            changed = False
        model.advance(now)
        if changed:
            carry_optimizer(optimizer, model)
        step(model, optimizer, now, split=split, forward=forward)
        seen.append([[event.kind for event in model.absorb(now)], state_digest(model.seeds)])
        seen[-1].append(digest(model))
    return seen


def gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether two models' weights are within the table."""
    assert found.keys() == expected.keys()
    return all(difference(a.numpy(), expected[name].numpy()).within for name, a in found.items())


def refusal(call: Call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def decide(now: int) -> list[Event]:
    def at(kind: EventKind, kernel_id: str = "", **more: Any) -> Event:
        return Event(now, 0, 0, kind, kernel_id, **more)

    plan = {
        1: [
            at(EventKind.LOAD, TANH),
            at(EventKind.ACTIVATE, TANH, value=0.1),
            at(EventKind.RAMP, value=1.0, span=3),
        ],
        5: [at(EventKind.UNLOAD), at(EventKind.LOAD, AFFINE), at(EventKind.ACTIVATE, AFFINE)],
        6: [at(EventKind.ALPHA, value=0.4)],
        8: [at(EventKind.FOLD)],
        9: [at(EventKind.LOAD, TANH), at(EventKind.ACTIVATE, TANH, value=0.7)],
        10: [at(EventKind.FOSSILIZE)],
    }
    return plan.get(now, [])


def shared(model: Any, forward: Any, folds: bool = True) -> list[Any]:
    """Rank 0 decides, and all ranks do as it says."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, foreach=True)
    seen = []
    for now in range(STEPS):
        decided = decide(now) if rank() == 0 else [Event(0, 9, 9, EventKind.RESET)]
        if not folds and now == 8:
            decided = [Event(now, 0, 0, EventKind.UNLOAD)]
        events = share_events(model, decided)
        if events:
            carry_optimizer(optimizer, model)
        model.advance(now)
        step(model, optimizer, now, split=True, forward=forward)
        seen.append([[str(e) for e in events], state_digest(model.seeds), digest(model)])
    return seen

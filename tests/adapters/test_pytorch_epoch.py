"""An epoch through a whole life of seeds; stopped anywhere and taken up again, bit by bit."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from esper_adapters.pytorch import carry_optimizer, wrap
from esper_functional import SeedLifecycleState, state_digest
from tests.adapters.kernels import artifact, torch_kernel

STEPS = 40
KERNELS = {
    artifact().kernel_id: torch_kernel(1),
    artifact("gated", 5, 4).kernel_id: torch_kernel(2, artifact("gated", 5, 4)),
}
DATA = np.random.default_rng(0)
X = torch.tensor(DATA.normal(size=(STEPS, 8, 3)), dtype=torch.float32)
Y = torch.tensor(DATA.integers(0, 4, size=(STEPS, 8)))


def make(blend):
    torch.manual_seed(0)
    host = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 4)
    )  # fmt: skip
    return wrap(host, blend=blend, resolve=KERNELS.__getitem__)


def surgery(model, step):
    """What happens before a step: two lives, one of which ends as a fossil."""
    first, second = KERNELS
    if step == 5:
        model.load_kernel_sync("0", 1, first, alpha=0.0, step=step)
        model.incubate("0", 1, step=step)
    if step == 8:
        model.ramp_seed_alpha("0", 1, 0.8, 10, step=step)
    if step == 3:
        model.load_kernel_sync("3", 0, second, alpha=0.2, step=step)
    if step == 20:
        model.fossilize("0", 1, step=step)
    if step == 30:
        model.unload_kernel_sync("3", 0, step=step)
    return step in (3, 5, 20, 30)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        if surgery(model, step):
            carry_optimizer(optimizer, model)
        model.advance(step)
        model.train()
        # The random state is a part of what is resumed; here each step has its own.
        torch.manual_seed(step)
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(X[step]), Y[step])
        for shadow in model.shadow_forward(X[step]):
            loss = loss + nn.functional.cross_entropy(shadow, Y[step])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 10 == 9:
            model.absorb(step)
    return losses


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


@pytest.mark.parametrize("blend", ["convex", "sequential"])
@pytest.mark.parametrize("stop", [3, 6, 11, 15, 22, 35])
def test_it_goes_on_bit_by_bit_in_a_freshly_wrapped_model(stop, blend):
    whole = make(blend)
    optimizer = adam(whole)
    losses = train(whole, optimizer, range(STEPS))
    assert whole.seeds.stage[0, 1] == SeedLifecycleState.FOSSILIZED

    first = make(blend)
    begun = adam(first)
    train(first, begun, range(stop))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": begun.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh = make(blend)
    resumed = adam(fresh)
    fresh.load_state_dict(saved["model"])
    carry_optimizer(resumed, fresh, saved=saved["optimizer"])
    resumed.load_state_dict(saved["optimizer"])
    again = train(fresh, resumed, range(stop, STEPS))

    assert [a.item() for a in again] == [a.item() for a in losses[stop:]]
    assert state_digest(fresh.seeds) == state_digest(whole.seeds)
    ours, theirs = fresh.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        if torch.is_tensor(tensor):
            assert torch.equal(ours[name], tensor), name
    for p, q in zip(fresh.parameters(), whole.parameters(), strict=True):
        assert set(resumed.state.get(p, {})) == set(optimizer.state.get(q, {}))
        for key, moment in optimizer.state.get(q, {}).items():
            assert torch.equal(resumed.state[p][key], moment), key

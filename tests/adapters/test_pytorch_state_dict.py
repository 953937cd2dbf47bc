"""A state_dict carries seeds and kernels, and a freshly wrapped model takes them back."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from esper_adapters.pytorch import SeededLayer, kernel_from_module, wrap
from esper_functional import KasminaException, state_digest
from tests.adapters.kernels import artifact, torch_kernel

X = torch.tensor(np.random.default_rng(3).normal(size=(4, 3)), dtype=torch.float32)
KERNEL = torch_kernel()


def make_host(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def resolve(kernel_id):
    return {KERNEL.kernel_id: KERNEL}[kernel_id]


def grown():
    model = wrap(make_host(), blend="residual", resolve=resolve)
    assert model.load_kernel_sync("0", 1, KERNEL.kernel_id, alpha=0.2, step=5)
    assert model.load_kernel_sync("0", 3, KERNEL.kernel_id, alpha=0.0)
    model.ramp_seed_alpha("0", 3, 1.0, 100, step=10)
    model.advance(35)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    model.fossilize("0", 1)
    return model


def through_a_file(state):
    """As torch loads what it does not trust."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_dormant_it_is_the_hosts():
    host, model = make_host(), wrap(make_host())
    assert list(model.state_dict()) == list(host.state_dict())
    model.load_state_dict(host.state_dict())
    host.load_state_dict(model.state_dict())


def test_a_freshly_wrapped_model_becomes_the_saved_one_and_goes_on_bit_by_bit():
    model = grown()
    fresh = wrap(make_host(7), blend="residual", resolve=resolve)
    state = through_a_file(model.state_dict())
    assert fresh.load_state_dict(state).missing_keys == []
    assert state_digest(fresh.seeds) == state_digest(model.seeds)
    assert fresh.seed_table.step == 35
    pairs = [(n, p, fresh.get_parameter(n)) for n, p in model.named_parameters()]
    assert all(torch.equal(p, other) for _, p, other in pairs)
    assert {n: p.requires_grad for n, p, _ in pairs} == {n: q.requires_grad for n, _, q in pairs}
    results = []
    for own in (model, fresh):
        optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], 0.1)
        for step in range(36, 40):
            own.advance(step)
            optimizer.zero_grad()
            loss = own(X).square().sum()
            loss.backward()
            optimizer.step()
        results.append([loss.detach(), *(p.detach() for p in own.parameters())])
        own.absorb(40)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_loading_into_a_model_that_holds_other_kernels_exchanges_them():
    model, other = grown(), wrap(make_host(1), blend="residual", resolve=resolve)
    SeededLayer.load_kernel_sync(
        other.kasmina_layers["0"], 1, kernel_from_module(nn.Linear(3, 5)), alpha=0.5
    )
    SeededLayer.load_kernel_sync(
        other.kasmina_layers["0"], 2, kernel_from_module(nn.Linear(3, 5)), alpha=0.5
    )
    other.load_state_dict(model.state_dict())
    assert [other[0].kernel(seed) is None for seed in range(4)] == [True, False, True, False]
    model.eval(), other.eval()
    assert torch.equal(other(X), model(X))
    again = copy.deepcopy(model.state_dict())
    held = model[0].kernel(1)
    model.load_state_dict(again)
    assert model[0].kernel(1) is held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds_per_layer": 2}, r"has 2 seeds, .*saved with 4, 'residual'"),
        ({"blend": "convex"}, r"blend 'convex' .*was saved with 4, 'residual'"),
        ({"resolve": None}, r"saved with kernel '[0-9a-f]{64}' in seed 1, which cannot be found"),
        ({"target_layers": ["2"]}, r"has seeds of \['0'\], .* seeds are \['2'\]: wrap with"),
    ],
)
def test_the_state_of_another_wrapping_is_refused_and_nothing_changes(options, message):
    state = grown().state_dict()
    fresh = wrap(make_host(1), **{"blend": "residual", "resolve": resolve, **options})
    before = copy.deepcopy(fresh.state_dict())
    digest = state_digest(fresh.seeds)
    with pytest.raises(KasminaException, match=message):
        fresh.load_state_dict(state)
    assert state_digest(fresh.seeds) == digest
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_a_stand_alone_layer_saves_and_loads_too():
    layer = grown().kasmina_layers["0"]
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(X), layer(X))
    assert artifact().kernel_id == KERNEL.kernel_id


def test_kernels_of_which_the_file_has_no_word_are_refused_and_kept():
    model, host = grown(), make_host(5)
    before = {n: t.clone() for n, t in model.state_dict().items() if torch.is_tensor(t)}
    with pytest.raises(KasminaException, match=r"layer '0' carries kernels, of which .* no word"):
        model.load_state_dict(host.state_dict())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.load_state_dict(host.state_dict(), strict=False)
    assert model[0].kernel(1) is not None
    assert torch.equal(model[0].weight, host[0].weight)

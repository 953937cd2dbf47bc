"""Whatever happens to the model, an incumbent's state in its optimiser stays what it was."""

import inspect

import pytest
import torch
from torch import nn

from esper_adapters.pytorch import SeededLayer, carry_optimizer, kernel_from_module, wrap
from esper_functional import KasminaException

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
NAMES = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    if name not in ("Optimizer", "LBFGS", "SparseAdam")
)


def made(name):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)))
    return model, getattr(torch.optim, name)(model.parameters(), lr=1e-3)


def load(model, layer, seed, inputs, outputs):
    torch.manual_seed(seed)
    kernel = kernel_from_module(nn.Linear(inputs, outputs, bias=False))
    SeededLayer.load_kernel_sync(model.kasmina_layers[layer], seed, kernel, alpha=0.3)


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def tensors(optimizer):
    """Every tensor of every parameter's state, as it is and as it was."""
    return {
        (id(p), key): (value, value.clone())
        for p, own in optimizer.state.items()
        for key, value in own.items()
        if isinstance(value, torch.Tensor)
    }


def assert_incumbents(optimizer, before, leaving=()):
    now = tensors(optimizer)
    gone = {id(p) for p in leaving}
    for (p, key), (held, copied) in before.items():
        if p in gone:
            assert (p, key) not in now
        else:
            assert now[p, key][0] is held
            assert torch.equal(held, copied)


@pytest.mark.parametrize("name", NAMES)
def test_a_life_leaves_every_incumbent_as_it_is(name):
    model, optimizer = made(name)
    groups = len(optimizer.param_groups)
    train(model, optimizer)

    before = tensors(optimizer)
    load(model, "0", 0, 3, 5)
    load(model, "2", 1, 5, 2)
    assert carry_optimizer(optimizer, model, lr=1e-2) is optimizer
    assert_incumbents(optimizer, before)
    grafted = optimizer.param_groups[groups:]
    assert [group["kernel"] for group in grafted] == ["0.kernel_0", "2.kernel_1"]
    assert [group["lr"] for group in grafted] == [1e-2, 1e-2]
    first, second = (list(model[i].kernel(s).parameters()) for i, s in ((0, 0), (2, 1)))
    assert not any(p in optimizer.state for p in (*first, *second))
    at_birth = [p.detach().clone() for p in (*first, *second)]
    train(model, optimizer)
    assert all((p != q).any() for p, q in zip((*first, *second), at_birth, strict=True))

    before = tensors(optimizer)
    model.fossilize("0", 0)
    carry_optimizer(optimizer, model)
    assert_incumbents(optimizer, before, leaving=first)
    frozen = [p.detach().clone() for p in first]
    train(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(first, frozen, strict=True))

    before = tensors(optimizer)
    model.unload_kernel_sync("2", 1)
    carry_optimizer(optimizer, model)
    assert_incumbents(optimizer, before, leaving=second)
    assert len(optimizer.param_groups) == groups
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(model[0].weight), id(model[2].weight)]
    train(model, optimizer)


def test_it_is_the_run_in_which_nothing_was_grafted():
    """A kernel at alpha 0 whose state is carried changes no other parameter's path."""
    results = []
    for grafted in (False, True):
        model, optimizer = made("Adam")
        train(model, optimizer)
        if grafted:
            SeededLayer.load_kernel_sync(
                model.kasmina_layers["0"], 0, kernel_from_module(nn.Linear(3, 5)), alpha=0.0
            )
            carry_optimizer(optimizer, model)
        train(model, optimizer, 3)
        results.append([model[0].weight.detach(), model[2].weight.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameters_of_others_stay():
    model, _ = made("SGD")
    extra = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    load(model, "0", 0, 3, 5)
    carry_optimizer(optimizer, model)
    model.unload_kernel_sync("0", 0)
    carry_optimizer(optimizer, model)
    assert optimizer.param_groups[0]["params"][-1] is extra
    assert carry_optimizer(optimizer, model).param_groups[0]["params"][-1] is extra


def test_parameters_with_names_keep_them():
    model, _ = made("SGD")
    optimizer = torch.optim.Adam(model.named_parameters())
    load(model, "0", 0, 3, 5)
    carry_optimizer(optimizer, model)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "2.weight"]
    assert optimizer.param_groups[1]["param_names"] == ["0.kernel_0.weight"]


def test_what_keeps_one_state_for_all_is_refused():
    model, _ = made("SGD")
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(KasminaException, match="LBFGS keeps one state for all parameters"):
        carry_optimizer(optimizer, model)

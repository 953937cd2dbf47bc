"""Models as people build them: bitwise their own dormant, and with a graft what they were plus it.

The laws are the same for all, and know nothing of any: see `architectures.py` for the models.
"""

import copy
import inspect
import math
import socket
from typing import Any

import pytest
import torch
from torch import nn

from esper_adapters.pytorch import SeededLayer, carry_optimizer, unwrap, wrap
from tests.adapters.architectures import ARCHITECTURES
from tests.adapters.grafting import (
    THIRD_PARTY_WARNINGS,
    assert_same_bits,
    called,
    examples,
    graft,
    grafted,
    learnt,
    made,
    same_bits,
    seeded,
    seen,
    targets_of,
)
from tests.tolerance import assert_close

pytestmark = THIRD_PARTY_WARNINGS

each = pytest.mark.parametrize("name", ARCHITECTURES)
CASES = [(name, target) for name, own in ARCHITECTURES.items() for target in own.targets]
each_target = pytest.mark.parametrize(("name", "target"), CASES)
each_target_and_all = pytest.mark.parametrize(
    ("name", "target"), [*CASES, *((name, "every layer") for name in ARCHITECTURES)]
)
each_that_generates = pytest.mark.parametrize(
    "name", [name for name, own in ARCHITECTURES.items() if own.generate]
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("a test of architectures asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_there_are_twenty_at_least():
    assert len(ARCHITECTURES) >= 20


@each_target_and_all
def test_dormant_it_is_its_host_bit_by_bit(name, target):
    own, host, model = seeded(name, target)
    for training in (True, False):
        assert_same_bits(learnt(own, model, training), learnt(own, host, training))
    assert_same_bits(seen(own, model), seen(own, host))


def anatomy(host: nn.Module) -> list[tuple[Any, ...]]:
    """All that wrapping could change of a host: modules, classes, attributes, hooks, tensors."""
    tables = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
    return [
        (
            path,
            id(module),
            type(module),
            {name: id(value) for name, value in vars(module).items()},
            [{key: id(value) for key, value in vars(module)[table].items()} for table in tables],
        )
        for path, module in host.named_modules()
    ]


@each_target_and_all
def test_it_is_an_instance_of_its_hosts_class_and_the_host_is_as_it_was(name, target):
    own, host = made(name)
    before, bits = anatomy(host), {k: v.clone() for k, v in host.state_dict().items()}
    model: Any = wrap(host, target_layers=targets_of(name, target), copy=True)
    learnt(own, model, True)
    assert isinstance(model, type(host))
    assert list(model.state_dict()) == list(host.state_dict())
    assert [path for path, _ in model.named_modules()] == [p for p, _ in host.named_modules()]
    assert inspect.signature(model.forward) == inspect.signature(host.forward)
    for layer in model.kasmina_layers.values():
        assert isinstance(layer, type(host.get_submodule(layer.layer_name)))
    assert anatomy(host) == before
    assert all(torch.equal(bits[key], value) for key, value in host.state_dict().items())


@each
def test_the_tensors_are_the_hosts_own_and_ties_stay_tied(name):
    _, host, model = seeded(name, "every layer", copied=False)
    for others in (model, unwrap(model)):
        own = [*host.named_parameters(remove_duplicate=False), *host.named_buffers()]
        theirs = [*others.named_parameters(remove_duplicate=False), *others.named_buffers()]
        assert [(path, id(tensor)) for path, tensor in theirs] == [(p, id(t)) for p, t in own]


# ---------------------------------------------------------------- grafts


@each_target
def test_a_graft_is_seen_trains_and_leaves_no_trace(name, target):
    own, host, model = seeded(name, target)
    bare = seen(own, host)
    for path, (x, h) in examples(own, model).items():
        _, _, model = seeded(name, target)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        layer = graft(model, path, x, h)
        kernel: Any = layer.kernel(0)
        carry_optimizer(optimizer, model)
        assert not all(map(same_bits, seen(own, model), bare)), path
        held = {key: p.detach().clone() for key, p in model.named_parameters()}
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            loss = own.loss(called(own, model))
            loss.backward()
            optimizer.step()
            assert math.isfinite(loss.item())
        moved = {key for key, p in model.named_parameters() if not torch.equal(p, held[key])}
        prefix = f"{path}.kernel_0." if path else "kernel_0."
        grown = {prefix + key for key, p in kernel.named_parameters() if p.dim() > 1}
        assert grown <= moved, path
        assert any(not key.startswith(prefix) for key in moved), path
        SeededLayer.set_seed_alpha(layer, 0, 0.0)
        trained = unwrap(model)
        for a, b in zip(seen(own, model), seen(own, trained), strict=True):
            assert_close(a, b)
        SeededLayer.unload_kernel_sync(layer, 0)
        assert list(model.state_dict()) == list(host.state_dict())
        assert_same_bits(seen(own, model), seen(own, trained))
        # Each with tensors of its own: running statistics move.
        twins = copy.deepcopy(model), copy.deepcopy(trained)
        assert_same_bits(*(learnt(own, twin, True) for twin in twins))


# ---------------------------------------------------------------- generation


@each_that_generates
def test_it_generates_as_its_host_does(name):
    for target in (*ARCHITECTURES[name].targets, "every layer"):
        own, host, model = seeded(name, target)
        assert torch.equal(own.generate(model.eval()), own.generate(host.eval())), target


@each_that_generates
def test_it_generates_with_a_graft(name):
    for target in ARCHITECTURES[name].targets:
        own, host, model = seeded(name, target)
        layer = grafted(own, model, alpha=1.0)
        tokens = own.generate(model.eval())
        # Kernels of vectors see one position or all, and make no difference of it.
        assert torch.equal(tokens, own.generate(model, use_cache=False)), target
        SeededLayer.unload_kernel_sync(layer, 0)
        assert torch.equal(own.generate(model), own.generate(host.eval())), target

"""A torch model as the core's data and back: the same network, and no memory in common."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from esper_adapters.pytorch import (
    from_functional,
    kernel_from_module,
    to_functional,
    unwrap,
    wrap,
)
from esper_functional import (
    BLENDS,
    Event,
    EventKind,
    KasminaException,
    apply_event,
    forward,
    gather,
    linear,
    plan,
    state_digest,
)
from tests.adapters.kernels import artifact, jax_kernel, torch_kernel
from tests.tolerance import assert_bitwise, assert_close


def net(params, site, x):
    h = jnp.tanh(site("0", linear, params["0"], x))
    return site("2", linear, params["2"], h)


def make(blend="convex"):
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    model = wrap(host, blend=blend, resolve=lambda _: torch_kernel(4))
    model.load_kernel_sync("0", 1, artifact().kernel_id, alpha=0.4)
    model.load_kernel_sync("2", 0, torch_kernel(5, artifact("gated", 5, 3)), alpha=0.3)
    return model


def run(functional, x):
    own = plan(functional.state, functional.kernels, functional.sites, blend=functional.blend)
    live = gather(functional.state, functional.kernels, own)
    return forward(net, own, functional.params, live, jnp.asarray(x))[0]


X = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)


@pytest.mark.parametrize("blend", BLENDS)
def test_the_core_computes_what_the_model_does(blend):
    model = make(blend)
    functional = to_functional(model)
    assert functional.sites == ("0", "2")
    assert state_digest(functional.state) == state_digest(model.seeds)
    assert_close(model(torch.tensor(X)).detach(), run(functional, X))


def test_there_and_back_is_the_same_model_bit_by_bit():
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items() if torch.is_tensor(t)}
    functional = to_functional(model)
    from_functional(model, functional)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert_bitwise(to_functional(model).params, functional.params)


def test_what_jax_has_trained_comes_back():
    model = make()
    functional = to_functional(model)
    grown = jax.tree.map(lambda p: p * 1.5, functional.params)
    kernels = {slot: jax.tree.map(lambda p: p * 0.5, k) for slot, k in functional.kernels.items()}
    state = apply_event(functional.state, Event(3, 0, 1, EventKind.ALPHA, value=0.9))
    changed = functional._replace(params=grown, kernels=kernels, state=state)
    from_functional(model, changed)
    assert model.seeds.alpha[0, 1] == np.float32(0.9)
    assert_close(model(torch.tensor(X)).detach(), run(changed, X))
    assert_bitwise(to_functional(model).kernels, kernels)


def test_a_kernel_that_jax_unloaded_is_gone():
    model = make()
    functional = to_functional(model)
    state = apply_event(functional.state, Event(3, 0, 1, EventKind.UNLOAD))
    kernels = {int(state.slot[1, 0]): functional.kernels[int(state.slot[1, 0])]}
    from_functional(model, functional._replace(state=state, kernels=kernels))
    assert model[0].kernel(1) is None
    assert_close(model(torch.tensor(X)).detach(), run(to_functional(model), X))


def test_no_memory_is_shared_in_either_direction():
    """In place, at once: jax runs ahead, and may not have read yet."""
    torch.manual_seed(0)
    wide = wrap(nn.Sequential(nn.Linear(1500, 1500)))
    expected = wide[0].weight.detach().clone().numpy()
    for _ in range(5):
        functional = to_functional(wide)
        kept = copy.deepcopy(wide[0].weight.detach())
        with torch.no_grad():
            wide[0].weight.zero_()
        np.testing.assert_array_equal(np.asarray(functional.params["0"]["weight"]), expected)
        from_functional(wide, functional)
        assert torch.equal(wide[0].weight, kept)
    with torch.no_grad():
        wide[0].weight.zero_()
    np.testing.assert_array_equal(np.asarray(functional.params["0"]["weight"]), expected)


def test_batch_statistics_and_ties_go_along():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.norm = nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.norm(self.embed(ids)))

    torch.manual_seed(0)
    model = wrap(Tied(), target_layers=["head"])
    model(torch.arange(7))
    functional = to_functional(model)
    assert set(functional.params) == {"embed", "norm"}
    mean = functional.buffers["norm"]["running_mean"]
    assert_bitwise(mean, model.norm.running_mean.numpy())
    doubled = jax.tree.map(lambda p: 2 * p, functional.params)
    from_functional(model, functional._replace(params=doubled))
    assert model.head.weight is model.embed.weight
    assert_bitwise(model.head.weight.detach().numpy(), np.asarray(doubled["embed"]["weight"]))


def test_what_does_not_fit_is_refused_and_the_model_as_it_was():
    model = make()
    functional = to_functional(model)
    digest, weights = state_digest(model.seeds), copy.deepcopy(unwrap(model).state_dict())
    params = dict(functional.params)
    other = make()
    other.unload_kernel_sync("0", 1)
    cases = {
        r"parameters \['2.bias', '2.weight'\] are in one of the two alone": (
            model, functional._replace(params={"0": params["0"]})),
        r"parameter '0.bias' is \[5\] here, and \[3\]": (
            model, functional._replace(params={**params, "0": {
                **params["0"], "bias": jnp.zeros(3)}})),
        r"the model has seeds \(2, 4\), and the state \(1, 4\)": (
            model, functional._replace(state=jax.tree.map(lambda a: a[:1], functional.state))),
        "seed 1 of layer '0' holds another kernel there": (other, functional),
    }  # fmt: skip
    for message, (target, given) in cases.items():
        with pytest.raises(KasminaException, match=f"from_functional: .*{message}"):
            from_functional(target, given)
    assert state_digest(model.seeds) == digest
    for name, tensor in unwrap(model).state_dict().items():
        assert torch.equal(tensor, weights[name])
    with pytest.raises(KasminaException, match="to_functional: Linear is not a wrapped model"):
        to_functional(nn.Linear(3, 3))


def test_kernels_of_torch_alone_need_their_twins():
    model = wrap(nn.Sequential(nn.Linear(3, 5)))
    kernel = kernel_from_module(nn.Linear(3, 5), kernel_id="ab" * 32)
    model.load_kernel_sync("0", 0, kernel)
    with pytest.raises(KasminaException, match="seed 0 of layer '0' is a function or module of"):
        to_functional(model)
    own = jax_kernel()
    twin = type(own)(type(own.program)("linear", linear), {"weight": 0, "bias": 0})
    functional = to_functional(model, resolve=lambda _: twin)
    assert_bitwise(functional.kernels[0].params["bias"], kernel.params["bias"].numpy())

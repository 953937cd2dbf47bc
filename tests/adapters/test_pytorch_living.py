"""Models with seeds among the other things of torch: transforms, autocast, checkpointing, files."""

import copy
import io
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from esper_adapters.pytorch import KasminaLayer, kernel_from_module, unwrap, wrap
from tests.adapters.kernels import artifact, root_kernel, torch_kernel
from tests.tolerance import assert_close


def make_host() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(rows: int = 6) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 3)


def grown(**options):
    model = wrap(make_host(), resolve=lambda _: torch_kernel(), **options)
    model.load_kernel_sync("0", 1, artifact().kernel_id, alpha=0.4)
    return model


def plain_kernel():
    torch.manual_seed(2)
    return kernel_from_module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)))


def as_bfloat16(y: torch.Tensor) -> np.ndarray:
    return np.asarray(jnp.asarray(y.detach().float().numpy(), jnp.bfloat16))


def detached(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_the_transforms_of_torch_func_see_through_a_graft(training):
    model, x = wrap(make_host()).train(training), batch()
    model.load_kernel_sync("0", 0, plain_kernel(), alpha=0.4)

    def loss(params, x):
        return functional_call(model, params, (x,)).square().sum()

    gradient = grad(loss)(detached(model), x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert_close(gradient[name], p.grad)
    each = vmap(grad(loss), in_dims=(None, 0))(detached(model), x)
    for row in range(len(x)):
        alone = grad(loss)(detached(model), x[row])
        for name, own in alone.items():
            assert_close(each[name][row], own)
    jacobian = torch.func.jacrev(lambda x: functional_call(model, detached(model), (x,)))(x)
    assert_close(jacobian, torch.autograd.functional.jacobian(model, x))


def test_a_population_of_parameters_runs_under_one_vmap():
    model, x = wrap(make_host()).eval(), batch()
    model.load_kernel_sync("0", 0, plain_kernel(), alpha=0.4)
    factors = torch.tensor([0.5, 1.0, 2.0])
    stacked = {n: torch.stack([f * p for f in factors]) for n, p in detached(model).items()}
    together = vmap(lambda p, x: functional_call(model, p, (x,)), in_dims=(0, None))(stacked, x)
    for i in range(len(factors)):
        alone = functional_call(model, {n: p[i] for n, p in stacked.items()}, (x,))
        assert_close(together[i], alone.detach())


def test_bad_examples_are_contained_under_transforms():
    layer = KasminaLayer(3, 5)
    layer.load_kernel_sync(0, root_kernel(), alpha=0.4)
    x = torch.tensor([[1.0, 2.0, 0.0], [-3.0, 1.0, 1.0], [0.5, 0.5, 0.5]], requires_grad=True)
    layer(x).sum().backward()

    def loss(params, x):
        return functional_call(layer, params, (x,)).sum()

    params = detached(layer)
    by_params, by_input = grad(loss, argnums=(0, 1))(params, x.detach())
    assert_close(by_input, x.grad)
    for name, p in layer.named_parameters():
        assert_close(by_params[name], p.grad)
    each = vmap(grad(loss), in_dims=(None, 0))(params, x.detach())
    assert not each["kernel_0.scale"][1].any()
    assert each["kernel_0.scale"][[0, 2]].all()


def test_transforms_count_nothing_and_leave_counts_as_they_were():
    layer = KasminaLayer(3, 5)
    layer.load_kernel_sync(0, root_kernel(), alpha=0.4)
    bad = torch.tensor([[-1.0, 0.0, 0.0]])
    layer(bad)
    grad(lambda p: functional_call(layer, p, (bad,)).sum())(detached(layer))
    assert layer.error_counts().tolist() == [1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_again_is_counted_once(reentrant):
    def run(checkpointed):
        torch.manual_seed(0)
        layer = KasminaLayer(3, 5)
        layer.load_kernel_sync(0, root_kernel(), alpha=0.4)
        x = torch.tensor([[1.0, 2.0, 0.0], [-3.0, 1.0, 1.0]], requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.sum().backward()
        return y.detach(), x.grad, [p.grad for p in layer.parameters()], layer.error_counts()

    (y, dx, grads, count), (y2, dx2, grads2, count2) = run(True), run(False)
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))
    assert count.tolist() == count2.tolist() == [1]


def test_autocast_runs_kernels_in_the_hosts_dtype():
    host, x = make_host(), batch()
    model = wrap(host)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), host(x))
    model.load_kernel_sync("0", 0, plain_kernel(), alpha=0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert_close(as_bfloat16(y), as_bfloat16(model(x)))
    assert all(p.grad.dtype == p.dtype and p.grad.any() for p in model.parameters())


def test_a_grad_scaler_skips_steps_whose_scaled_loss_overflows():
    model, x = wrap(make_host()), batch()
    model.load_kernel_sync("0", 0, plain_kernel(), alpha=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)
    before = detached(copy.deepcopy(model))
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale((model(x) * 1e6).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    # The host's own gradients overflowed, and the scaler saw it.
    assert scaler.get_scale() < 2.0**120
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [lambda m: pickle.loads(pickle.dumps(m)), through_torch])
@pytest.mark.parametrize("make", [plain_kernel, torch_kernel], ids=["native", "torchscript"])
def test_a_grown_model_is_pickled_with_its_kernels(how, make):
    model, x = wrap(make_host()), batch()
    model.load_kernel_sync("0", 1, make(), alpha=0.4)
    model.ramp_seed_alpha("0", 1, 1.0, 4)
    again = how(model)
    assert type(again) is type(model)
    assert torch.equal(again(x), model(x))
    for twin in (model, again):
        twin.advance(3)
    assert torch.equal(again(x), model(x))
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    again.unload_kernel_sync("0", 1)
    assert torch.equal(again(x), unwrap(model)(x))


def test_a_state_dict_holds_plain_data_and_loads_as_weights_only():
    model, x = grown(), batch()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = wrap(make_host(), resolve=lambda _: torch_kernel())
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(x), model(x))


def test_copies_of_a_grown_model_share_programs_and_nothing_else():
    model = grown()
    twin = copy.deepcopy(model)
    ours, theirs = model[0].kernel(1), twin[0].kernel(1)
    assert ours.program is theirs.program
    ours, theirs = ([*m.parameters(), *m.buffers()] for m in (model, twin))
    pairs = zip(ours, theirs, strict=True)
    assert all(a is not b and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_half_precision_keeps_the_blend_weights():
    model, x = grown(), batch()
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    live = model[0]._live
    assert live.host_weight.dtype == torch.float32
    assert_close(live.weights[0], np.float32(0.4))
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_schedulers_go_on_with_the_groups_of_grafts():
    from esper_adapters.pytorch import carry_optimizer

    model, x = wrap(make_host()), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    model.load_kernel_sync("0", 0, plain_kernel(), alpha=0.4)
    carry_optimizer(optimizer, model, lr=0.3)
    model(x).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.15])

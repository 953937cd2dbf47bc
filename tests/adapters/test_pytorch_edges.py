"""Where models, kernels and calls are not the usual ones: refused by name, or right."""

import asyncio
import copy
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from esper_adapters.pytorch import (
    KasminaLayer,
    SeededLayer,
    carry_optimizer,
    export_plain,
    from_functional,
    kernel_from_function,
    kernel_from_jax,
    kernel_from_module,
    to_functional,
    unwrap,
    wrap,
)
from esper_functional import (
    FoldError,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleError,
    SeedLifecycleState,
)
from esper_functional import kernel_from_function as jax_kernel_from_function
from tests.adapters.kernels import root_kernel, torch_kernel

S = SeedLifecycleState
BAD = torch.tensor([[-3.0, 1.0, 1.0]])


class Odd(nn.Module):
    """A kernel with a buffer that training changes, noise, and a parameter that is frozen."""

    def __init__(self, inputs: int = 3, outputs: int = 5) -> None:
        super().__init__()
        self.lift = nn.Linear(inputs, outputs)
        self.lift.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(outputs)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.lift(x)))


def odd(seed: int = 0):
    torch.manual_seed(seed)
    return kernel_from_module(Odd(), kernel_id="ab" * 32)


def make(*layers: nn.Module, **options):
    torch.manual_seed(0)
    return wrap(nn.Sequential(*(layers or (nn.Linear(3, 5), nn.Linear(5, 3)))), **options)


def batch(rows: int = 6) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(2).normal(size=(rows, 3)), dtype=torch.float32)


# ---- kernels that are modules ----


def test_a_modules_buffers_and_modes_are_the_models():
    model = make(resolve=lambda _: odd(1))
    model.load_kernel_sync("0", 0, odd(), alpha=0.5)
    kernel = model[0].kernel(0)
    assert kernel.norm_num_batches_tracked == 0
    model(batch())
    assert kernel.norm_num_batches_tracked == 1
    model.eval()
    assert torch.equal(model(batch()), model(batch()))
    assert kernel.norm_num_batches_tracked == 1
    assert not kernel.lift_bias.requires_grad
    assert kernel.lift_weight.requires_grad
    fresh = make(resolve=lambda _: odd(1))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(batch()), model(batch()))
    twin = copy.deepcopy(model).train()
    twin(batch())
    assert twin[0].kernel(0).norm_num_batches_tracked == 2
    assert kernel.norm_num_batches_tracked == 1
    model.double()
    assert model(batch().double()).dtype == torch.float64
    plain = export_plain(model)
    assert torch.allclose(plain(batch().double()), model(batch().double()))


def test_a_module_is_copied_when_a_kernel_is_made_of_it():
    module = nn.Linear(3, 5)
    kernel, weight = kernel_from_module(module), module.weight.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    layer = KasminaLayer(3, 5)
    layer.load_kernel_sync(0, kernel)
    assert torch.equal(layer.kernel(0).weight, weight)


def test_copies_and_threads_do_not_meet_in_a_kernels_module():
    torch.manual_seed(0)
    first = make().eval()
    first.load_kernel_sync("0", 0, odd(), alpha=1.0)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p in second[0].kernel(0).parameters():
            p.mul_(-2.0)
        expected = [model(batch()).clone() for model in (first, second)]
    wrong, barrier = [], threading.Barrier(4)

    def call(model, y):
        barrier.wait()
        with torch.no_grad():
            outputs = [model(batch()) for _ in range(200)]
        wrong.extend(output for output in outputs if not torch.equal(output, y))

    pairs = list(zip((first, second) * 2, expected * 2, strict=True))
    threads = [threading.Thread(target=call, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_refused_fold_leaves_buffers_and_random_numbers_as_they_were():
    model = make()
    model.load_kernel_sync("0", 0, odd(), alpha=0.5)
    state, tracked = torch.get_rng_state(), int(model[0].kernel(0).norm_num_batches_tracked)
    with pytest.raises(FoldError):
        model.fold("0", 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model[0].kernel(0).norm_num_batches_tracked) == tracked


@pytest.mark.parametrize("name", ["errors", "working", "forward", "training", "route", "type"])
def test_parameters_may_be_called_as_they_like(name):
    layer = KasminaLayer(3, 5)
    kernel = kernel_from_function(lambda w, x: x @ w, {name: torch.ones(3, 5)})
    layer.load_kernel_sync(0, kernel, alpha=1.0)
    assert torch.equal(layer(batch()), batch() @ torch.ones(3, 5))
    assert layer.kernel(0).param_names == (name,)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 5)), "changes its input in place"),
        (nn.LSTM(3, 5), "gives a tuple, and not a tensor"),
    ],
)
def test_kernels_that_meddle_are_refused(module, message):
    with pytest.raises(KernelMismatchError, match=message):
        KasminaLayer(3, 5).load_kernel_sync(0, kernel_from_module(module))


def test_examples_of_more_axes_than_the_input_has_are_refused():
    layer = KasminaLayer(3, 5)
    layer.load_kernel_sync(0, kernel_from_module(nn.Linear(3, 5), example_rank=2))
    with pytest.raises(KernelMismatchError, match="examples with 2 axes cannot take an input of 1"):
        layer(torch.randn(3))


def test_complex_kernels_are_contained_and_differentiated():
    layer = KasminaLayer(3, 5, dtype=torch.complex64)
    kernel = kernel_from_function(lambda w, x: x @ w, {"w": torch.ones(3, 5) * 1j})
    layer.load_kernel_sync(0, kernel, alpha=0.5)
    x = torch.randn(4, 3, dtype=torch.complex64, requires_grad=True)
    layer(x).abs().sum().backward()
    twin = x.detach().clone().requires_grad_()
    y = 0.5 * nn.functional.linear(twin, layer.weight, layer.bias) + 0.5 * (
        twin @ kernel.params["w"]
    )
    y.abs().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


# ---- seeds ----


def test_a_layer_that_was_replaced_is_missed_by_name():
    model = make(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0] = nn.Linear(3, 3)
    model.load_kernel_sync("1", 0, kernel_from_module(nn.Linear(3, 3)))
    assert [name for name, layer in model.kasmina_layers.items() if layer.kernel(0)] == ["1"]
    with pytest.raises(SeedIndexError, match="layer '0' was replaced by another, which has no"):
        model.load_kernel_sync("0", 0, kernel_from_module(nn.Linear(3, 3)))


def test_a_listener_that_raises_comes_after_all_is_done():
    model = make()

    def raising(event):
        raise RuntimeError("no")

    model.seed_table.listeners.append(raising)
    with pytest.raises(RuntimeError, match="no"):
        model.load_kernel_sync("0", 0, torch_kernel(), alpha=0.5)
    model.seed_table.listeners.clear()
    stage = S(int(model.seeds.stage[0, 0]))
    assert (stage is S.ACTIVE) == (model[0].kernel(0) is not None)
    assert len(model.absorb()) == 0


def test_a_load_that_was_overtaken_changes_nothing():
    slow, kernels = threading.Event(), {"aa" * 32: torch_kernel(1), "bb" * 32: torch_kernel(2)}

    def resolve(kernel_id):
        if kernel_id == "aa" * 32:
            assert slow.wait(10)
        return kernels[kernel_id]

    model = make(resolve=resolve)

    async def both():
        first = asyncio.create_task(model.load_kernel("0", 0, "aa" * 32, alpha=1.0))
        await asyncio.sleep(0.05)
        model[0].state_layout.reset_seed(0)
        assert await model.load_kernel("0", 0, "bb" * 32, alpha=1.0)
        slow.set()
        return await first

    assert not asyncio.run(both())
    assert model[0].kernel(0).kernel_id == "bb" * 32
    assert model.seeds.stage[0, 0] == S.ACTIVE


def failed(**options):
    model = make(**options)
    model.load_kernel_sync("0", 0, root_kernel(), alpha=0.5)
    for _ in range(3):
        model(BAD)
    return model


@pytest.mark.parametrize("change", ["fold", "fossilize"])
def test_a_kernel_that_has_stopped_is_no_part_of_what_is_kept(change):
    model, x = failed(), batch().abs()
    y = model(x)
    with pytest.raises(SeedLifecycleError, match="is ERROR_RECOVERY and cannot"):
        getattr(model, change)("0", 0)
    assert torch.equal(model(x), y)
    assert torch.equal(export_plain(failed())(x), y)


def test_loading_what_was_saved_before_it_froze_lets_it_train_again():
    model = make(resolve=lambda _: torch_kernel())
    model.load_kernel_sync("0", 0, "ab" * 32, alpha=0.5, step=3)
    saved = copy.deepcopy(model.state_dict())
    model.fossilize("0", 0, step=60)
    model.load_state_dict(saved)
    assert all(p.requires_grad for p in model[0].kernel(0).parameters())
    assert model.seed_table.step == 3
    model.advance(4)


def test_what_was_being_loaded_when_it_was_saved_is_dormant():
    model = make()
    model[0].state_layout.transition_seed_state(1, S.LOADING)
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    assert (fresh.seeds.stage == S.DORMANT).all()


def test_a_wrapped_model_within_another_refuses_before_anything_of_it_is_changed():
    kernels = {"ab" * 32: torch_kernel()}
    outer = nn.ModuleDict({"inner": make(resolve=kernels.__getitem__)})
    outer["inner"].load_kernel_sync("0", 0, "ab" * 32)
    fresh = nn.ModuleDict({"inner": make(resolve={}.__getitem__)})
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    with torch.no_grad():
        for p in outer.parameters():
            p.add_(1.0)
    with pytest.raises(KasminaException, match="cannot be found"):
        fresh.load_state_dict(outer.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in fresh.named_parameters())


def test_parameters_may_be_assigned_into_a_model_without_memory():
    kernels = {"ab" * 32: torch_kernel()}
    model = make(resolve=kernels.__getitem__)
    model.load_kernel_sync("0", 0, "ab" * 32, alpha=0.4)
    with torch.device("meta"):
        empty = make(resolve=kernels.__getitem__)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(batch()), model(batch()))
    assert empty[0].error_counts().tolist() == [0]


def test_a_shadow_counts_its_own_kernel_alone():
    model = make()
    model.load_kernel_sync("0", 0, root_kernel(), alpha=0.5)
    for seed in (0, 1):
        model.load_kernel_sync("1", seed, kernel_from_module(nn.Linear(5, 3)), alpha=0.0)
        model.incubate("1", seed)
    model(BAD)
    model.shadow_forward(BAD)
    assert model[0].error_counts().tolist() == [1]


def test_a_shadow_in_a_fused_layer_shows_its_kernel_in_evaluation_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    model = wrap(nn.Sequential(layer), target_layers=["0.linear1"]).eval()
    model.load_kernel_sync("0.linear1", 0, kernel_from_module(nn.Linear(4, 8)), alpha=0.0)
    model.incubate("0.linear1", 0)
    x = torch.randn(2, 3, 4)
    (shadow,) = model.shadow_forward(x)
    assert (shadow - model(x)).abs().max() > 1e-2
    shadow.sum().backward()
    assert model[0].linear1.kernel(0).weight.grad.any()
    assert not model[0].linear1._forward_pre_hooks


def test_a_comparison_shows_the_state_afterwards_whatever_happened_meanwhile():
    model = make()
    model.load_kernel_sync("0", 0, torch_kernel(), alpha=0.5)

    def unload(*_):
        if model[0].kernel(0) is not None:
            model.unload_kernel_sync("0", 0)

    hook = model[1].register_forward_hook(unload)
    model.compare_with_original(batch())
    hook.remove()
    assert model[0]._live is None


def test_alphas_that_moved_in_inference_mode_serve_training():
    model = make()
    model.load_kernel_sync("0", 0, torch_kernel(), alpha=0.0)
    model.ramp_seed_alpha("0", 0, 1.0, 10)
    with torch.inference_mode():
        model.advance(5)
        model(batch())
    model(batch()).sum().backward()
    assert all(p.grad is not None for p in model[0].kernel(0).parameters())


def test_an_empty_batch_shows_nothing():
    model = make()
    model.load_kernel_sync("0", 0, root_kernel(), alpha=0.5)
    model(BAD)
    with model.health_sample() as sample:
        assert model(batch(0)).shape == (0, 3)
    assert model.observe_health(sample) == []
    assert model[0].error_counts().tolist() == [1]


# ---- hosts ----


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(3))

    def forward(self, x):
        return x @ self.kernel


class Blended(nn.Linear):
    blend = 0.5


class Folds(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def fold(self, x):
        return 2 * x

    def forward(self, x):
        return self.fold(self.layer(x))


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"mine": 1}

    def set_extra_state(self, state):
        assert state == {"mine": 1}


class Dense(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Named(), r"has attributes of its own, \['kernel'\], which a layer with seeds has too"),
        (Blended(3, 3), r"has attributes of its own, \['blend'\]"),
        (Extra(3, 3), "has an extra state of its own"),
        (Dense({"a": nn.Linear(3, 3)}), "may go through all modules in it"),
        (nn.LazyLinear(3), "has no parameters yet: call the model once"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_layers_that_seeds_would_disturb_are_left_alone(layer, reason):
    with pytest.raises(SeedIndexError, match=reason):
        wrap(nn.Sequential(layer), target_layers=["0"])


def test_a_host_whose_methods_would_be_hidden_is_refused():
    with pytest.raises(KasminaException, match=r"wrap: Folds has \['fold'\], which a wrapped"):
        wrap(Folds())


def test_a_dormant_model_with_extra_states_loads_its_own_file():
    model = wrap(nn.Sequential(Extra(3, 3), nn.Linear(3, 3)), target_layers=["1"])
    model.load_state_dict(model.state_dict())


def test_a_parametrisation_that_came_after_is_named():
    model = make()
    nn.utils.parametrizations.weight_norm(model[0])
    assert parametrize.is_parametrized(model[0])
    with pytest.raises(KasminaException, match="made another after it was wrapped, by a param"):
        unwrap(model)


def test_a_slice_of_a_sequence_with_seeds_has_no_kernels_among_its_layers():
    inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = wrap(nn.Sequential(inner), target_layers=["0"])
    SeededLayer.load_kernel_sync(
        model.kasmina_layers["0"], 0, kernel_from_module(nn.Linear(3, 3)), alpha=0.5
    )
    assert len(model[0]) == 2
    assert type(model[:1]) is nn.Sequential
    assert type(model) is not nn.Sequential
    assert [type(part) for part in model[0][:]] == [nn.Linear, nn.Tanh]
    assert model[0][-1] is inner[-1] or isinstance(model[0][-1], nn.Tanh)


class Pair(NamedTuple):
    y: torch.Tensor
    more: str


class Several(nn.Linear):
    kind = tuple

    def forward(self, x):
        y = super().forward(x)
        return Pair(y, "more") if self.kind is Pair else self.kind([y, "more"])


@pytest.mark.parametrize("kind", [tuple, list, Pair])
def test_what_is_exported_returns_what_the_layer_did(kind):
    torch.manual_seed(0)
    layer = Several(3, 5)
    layer.kind = kind
    model = wrap(nn.ModuleDict({"layer": layer}), target_layers=["layer"])
    seeded = model.kasmina_layers["layer"]
    SeededLayer.load_kernel_sync(
        seeded, 0, kernel_from_module(nn.Sequential(nn.Linear(3, 5), nn.Tanh())), alpha=0.5
    )
    y, more = seeded(batch())
    plain = export_plain(model)["layer"](batch())
    assert type(plain) is kind
    assert more == "more"
    torch.testing.assert_close(plain[0], y)


def test_a_double_host_is_folded_in_double():
    model = make(nn.Linear(3, 5, dtype=torch.float64))
    kernel = kernel_from_module(nn.Linear(3, 5, bias=False, dtype=torch.float64))
    model.load_kernel_sync("0", 0, kernel, alpha=0.3)
    x = batch().double()
    y = model(x)
    model.fold("0", 0)
    assert (model(x) - y).abs().max() < 1e-14


def test_the_core_takes_a_kernel_of_one_array():
    import jax.numpy as jnp

    kernel = jax_kernel_from_function(lambda w, x: x @ w, jnp.ones((3, 5)))
    model = make(nn.Linear(3, 5))
    model.load_kernel_sync("0", 0, kernel_from_jax(kernel), alpha=0.5)
    found = to_functional(model)
    assert found.kernels[0].params.shape == (3, 5)
    from_functional(model, found)


def test_a_new_group_is_as_far_along_the_schedule_as_the_first():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    empty = {"params": [], "lr": 7.0}
    optimizer.param_groups.append({**optimizer.param_groups[0], **empty})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    model.load_kernel_sync("0", 0, torch_kernel(), alpha=0.5)
    carry_optimizer(optimizer, model)
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs == pytest.approx([0.01, 0.07, 0.01])


# ---- what is said where something is missing ----


def test_a_kernel_that_came_without_an_id_is_kept_by_the_one_asked_for():
    bare = kernel_from_module(nn.Linear(3, 5))
    model = make(resolve=lambda _: bare)
    model.load_kernel_sync("0", 0, "ab" * 32, alpha=0.5)
    fresh = make(resolve=lambda _: bare)
    fresh.load_state_dict(model.state_dict())
    assert fresh[0].kernel(0).kernel_id == "ab" * 32
    assert torch.equal(fresh(batch()), model(batch()))


def test_kernels_without_ids_are_told_apart_by_what_they_are_made_of():
    first, second = make(), make()
    first.load_kernel_sync("0", 0, kernel_from_module(nn.Linear(3, 5)))
    second.load_kernel_sync("0", 0, kernel_from_module(nn.Sequential(nn.Linear(3, 5), nn.Tanh())))
    with pytest.raises(KasminaException, match="'without an id' in seed 0, which cannot be found"):
        second.load_state_dict(first.state_dict())
    first.load_state_dict(first.state_dict())


def test_a_comparison_of_nothing_is_refused():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x):
            return self.layer(x).argmax(-1)

    with pytest.raises(KasminaException, match="returns no floating-point numbers to compare"):
        wrap(Nothing()).compare_with_original(batch())


def test_changes_without_a_step_do_not_race_with_a_model_that_goes_on():
    model, errors = make(), []
    model.load_kernel_sync("0", 0, torch_kernel(), alpha=0.5)
    done = threading.Event()

    def goes_on():
        for step in range(2000):
            model.advance(step)
        done.set()

    thread = threading.Thread(target=goes_on)
    thread.start()
    changes = 0
    while not done.is_set() or not changes:
        try:
            model.set_seed_alpha("0", 0, 0.5)
        except KasminaException as error:
            errors.append(error)
        changes += 1
    thread.join()
    assert errors == []

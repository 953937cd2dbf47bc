"""KasminaLayer: an nn.Linear while it is dormant, the blend's formula while it is not."""

import asyncio
import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch
from torch import nn

from esper.artifacts import load_torchscript
from esper_adapters.pytorch import KasminaLayer, SeedTable, advance_layers
from esper_functional import (
    BLENDS,
    Event,
    EventKind,
    SeedLifecycleError,
    SeedLifecycleState,
    fold_events,
    init_seeds,
    kernel_id_words,
    state_digest,
)
from tests.adapters.kernels import artifact, run_torch, torch_kernel
from tests.tolerance import assert_close

S = SeedLifecycleState


def make_layer(**options) -> KasminaLayer:
    torch.manual_seed(0)
    return KasminaLayer(3, 5, **{"layer_name": "fc", "num_seeds": 3, **options})


def bare_twin(layer: KasminaLayer) -> nn.Linear:
    twin = nn.Linear(3, 5, bias=layer.bias is not None)
    own = {"weight", "bias"}
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k in own})
    return twin


def inputs(*lead: int) -> torch.Tensor:
    values = np.random.default_rng(4).normal(size=(*(lead or (6,)), 3))
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def stage(layer: KasminaLayer, seed: int = 0) -> S:
    return S(int(layer.seeds.stage[layer.row, seed]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(6,), (), (2, 3)])
def test_dormant_output_and_gradients_are_bitwise_the_bare_layers(bias, lead):
    layer = make_layer(bias=bias)
    ours, theirs, x, y = layer, bare_twin(layer), inputs(*lead), inputs(*lead)
    left, right = ours(x), theirs(y)
    left.square().sum().backward()
    right.square().sum().backward()
    assert torch.equal(left, right)
    assert torch.equal(x.grad, y.grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_it_is_a_linear_layer_with_its_keys():
    layer = make_layer()
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert (layer.layer_name, layer.num_seeds, layer.row) == ("fc", 3, 0)
    assert torch.equal(layer.weight, bare_twin(layer).weight)


@pytest.mark.parametrize("blend", BLENDS)
def test_the_output_is_the_formula(blend):
    layer, x = make_layer(blend=blend), inputs()
    kernels = [torch_kernel(0), torch_kernel(1)]
    layer.load_kernel_sync(0, kernels[0], alpha=0.25)
    layer.load_kernel_sync(2, kernels[1], alpha=0.5)
    h = bare_twin(layer)(x)
    first, second = (run_torch(kernel, x) for kernel in kernels)
    expected = {
        "convex": 0.25 * h + 0.25 * first + 0.5 * second,
        "residual": h + 0.25 * first + 0.5 * second,
        "sequential": 0.5 * (0.75 * h + 0.25 * first) + 0.5 * second,
    }[blend]
    assert_close(layer(x).detach(), expected.detach())


@pytest.mark.parametrize("blend", BLENDS)
def test_alpha_zero_is_the_host_exactly(blend):
    layer, x = make_layer(blend=blend), inputs()
    layer.load_kernel_sync(0, torch_kernel(), alpha=0.0)
    assert torch.equal(layer(x), bare_twin(layer)(x))


def test_alpha_one_is_the_kernel_exactly_under_convex():
    layer, x = make_layer(), inputs()
    layer.load_kernel_sync(1, torch_kernel(), alpha=1.0)
    assert torch.equal(layer(x), run_torch(torch_kernel(), x))


@pytest.mark.parametrize(("confidence", "alpha"), [(0.5, 0.3), (0.0, 0.0), (0.9, 0.5), (1.0, 0.5)])
def test_the_first_alpha_follows_the_confidence(confidence, alpha):
    layer, kernel = make_layer(), torch_kernel()
    layer.load_kernel_sync(0, type(kernel)(**{**vars(kernel), "confidence": confidence}))
    assert_close(layer.seeds.alpha[0, 0], np.float32(alpha))


def test_a_graft_registers_trains_and_unloads():
    layer, x = make_layer(), inputs()
    assert layer.load_kernel_sync(1, torch_kernel(), alpha=0.5, step=3)
    assert stage(layer, 1) is S.ACTIVE
    assert tuple(layer.seeds.kernel_id[0, 1]) == kernel_id_words(artifact().kernel_id)
    names = {f"kernel_1.{name.replace('.', '_')}" for name in artifact().params}
    assert set(dict(layer.named_parameters())) == {"weight", "bias"} | names
    assert set(layer.state_dict()) == {"weight", "bias", "_extra_state"} | names
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimiser.step()
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    layer.unload_kernel_sync(1, step=5)
    assert stage(layer, 1) is S.DORMANT
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(x), bare_twin(layer)(x))
    assert layer.seeds.last_update[0, 1] == 5


def test_isolation_keeps_the_kernel_from_the_input_alone():
    layer, x, y = make_layer(isolate=True), inputs(), inputs()
    layer.load_kernel_sync(0, torch_kernel(), alpha=0.5)
    layer(x).sum().backward()
    (0.5 * bare_twin(layer)(y)).sum().backward()
    assert_close(x.grad, y.grad)
    assert all(p.grad.any() for p in layer.kernel(0).parameters())


def test_a_fossil_is_frozen_and_stays():
    layer, x = make_layer(), inputs()
    layer.load_kernel_sync(0, torch_kernel(), alpha=0.5)
    before = layer(x).detach()
    layer.fossilize(0)
    assert torch.equal(layer(x), before)
    layer(x).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in layer.kernel(0).parameters())
    assert layer.weight.grad.any()
    for change in (
        lambda: layer.unload_kernel_sync(0),
        lambda: layer.set_seed_alpha(0, 0.1),
        lambda: layer.load_kernel_sync(0, torch_kernel(1)),
    ):
        with pytest.raises(SeedLifecycleError, match="seed 0 of layer 'fc' is FOSSILIZED"):
            change()
    assert torch.equal(layer(x), before)


def test_a_ramp_is_advanced_from_outside():
    layer, x = make_layer(), inputs()
    layer.load_kernel_sync(0, torch_kernel(), alpha=0.0)
    layer.apply_event(Event(0, 0, 0, EventKind.RAMP, value=1.0, span=4))
    table: SeedTable = layer._table
    outputs = []
    for step in range(5):
        advance_layers(table, [layer], step)
        outputs.append(layer(x).detach())
    assert torch.equal(outputs[0], bare_twin(layer)(x))
    assert_close(outputs[2], ((outputs[0] + outputs[4]) / 2).detach())
    assert torch.equal(outputs[4], run_torch(torch_kernel(), x))
    assert not advance_layers(table, [layer], 5)


def test_the_state_is_the_fold_of_the_events_that_listeners_hear():
    layer, heard = make_layer(), []
    layer._table.listeners.append(heard.append)
    layer.load_kernel_sync(0, torch_kernel(0), step=1)
    layer.load_kernel_sync(1, torch_kernel(1), step=2)
    layer.set_seed_alpha(0, 0.9, step=3)
    layer.fossilize(0, step=4)
    layer.unload_kernel_sync(1, step=5)
    assert state_digest(fold_events(init_seeds(1, 3), heard)) == state_digest(layer.seeds)


def test_a_copy_and_a_move_take_the_kernel_along():
    layer, x = make_layer(), inputs()
    layer.load_kernel_sync(0, torch_kernel(), alpha=0.5)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.set_seed_alpha(0, 1.0)
    assert layer.seeds.alpha[0, 0] == 0.5
    twin.to("meta")
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    assert twin(x.to("meta")).device.type == "meta"
    assert {p.device.type for p in layer.parameters()} == {"cpu"}


def test_capture_gives_the_running_kernels_outputs():
    layer, x = make_layer(), inputs()
    assert layer.capture(x) == []
    layer.load_kernel_sync(2, torch_kernel(1))
    (output,) = layer.capture(x)
    assert torch.equal(output, run_torch(torch_kernel(1), x))


def test_what_is_captured_has_no_gradient():
    layer, x = make_layer(), inputs()
    # A program of its own, so that its first runs, which TorchScript profiles, are these.
    program = load_torchscript(artifact().torchscript)
    layer.load_kernel_sync(0, dataclasses.replace(torch_kernel(), program=program))
    for _ in range(3):
        layer(x).sum().backward()
    (output,) = layer.capture(x)
    assert not output.requires_grad


def test_it_takes_the_owners_arguments():
    kernels = {artifact().kernel_id: torch_kernel()}
    layer = KasminaLayer(
        input_size=3,
        output_size=5,
        num_seeds=2,
        cache_size_mb=1,
        telemetry_enabled=False,
        layer_name="transformer.dense",
        resolve=kernels.__getitem__,
    )
    assert (layer.in_features, layer.out_features, layer.num_seeds) == (3, 5, 2)
    assert (layer.layer_name, layer.telemetry_enabled) == ("transformer.dense", False)
    original = nn.Linear(3, 5)
    with torch.no_grad():
        layer.default_transform.weight.copy_(original.weight)
        layer.default_transform.bias.copy_(original.bias)
    assert torch.equal(layer(inputs()), original(inputs()))
    assert asyncio.run(layer.load_kernel(seed_idx=0, kernel=artifact().kernel_id))
    assert not asyncio.run(layer.load_kernel(1, "00" * 32))
    assert stage(layer, 1) is S.DORMANT
    layer.set_seed_alpha(0, 0.4)
    assert asyncio.run(layer.unload_kernel(0))
    assert layer.load_kernel_sync(0, artifact().kernel_id)
    cache = layer.get_layer_stats()["cache_stats"]
    assert (cache["entries"], cache["hits"], cache["max_size_mb"]) == (1, 1, 1)


def test_kernels_that_were_used_last_stay_at_hand_as_far_as_there_is_room():
    asked: list[str] = []
    wide = np.zeros((100, 1000), np.float32)

    def resolve(kernel_id: str):
        asked.append(kernel_id)
        return dataclasses.replace(torch_kernel(), kernel_id=kernel_id, params={"w": wide})

    table = SeedTable(("fc",), 1, cache_size_mb=1)
    table.resolve = resolve
    for kernel_id in ("a", "b", "a", "c", "a", "b"):
        table.fetch(kernel_id)
    # Two of 0.4 MB have room; of b, the oldest by then, c took the place.
    assert asked == ["a", "b", "c", "b"]
    stats = table.recent.stats()
    assert (stats["entries"], stats["hits"], stats["misses"]) == (2, 2, 4)
    assert stats["total_size_mb"] == 2 * wide.nbytes / (1 << 20)


def test_loads_work_inside_and_outside_of_a_running_loop_and_forward_goes_on():
    """While a kernel is looked for, the layer runs, and is its host."""
    begun, found = threading.Event(), threading.Event()

    def resolve(kernel_id: str):
        begun.set()
        assert found.wait(10)
        return torch_kernel()

    layer, x = make_layer(resolve=resolve), inputs()

    async def growing() -> bool:
        task = asyncio.create_task(layer.load_kernel(0, artifact().kernel_id, alpha=1.0))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        assert stage(layer) is S.LOADING
        assert torch.equal(layer(x), bare_twin(layer)(x))
        found.set()
        done = await task
        # The synchronous twin, in the running loop.
        return done and layer.load_kernel_sync(1, torch_kernel(1), alpha=0.0)

    assert asyncio.run(growing())
    assert torch.equal(layer(x), run_torch(torch_kernel(), x))
    assert layer.load_kernel_sync(2, artifact().kernel_id)

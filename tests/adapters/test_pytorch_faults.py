"""Kernels that fail in torch: contained, counted on the device, absorbed at boundaries."""

import pytest
import torch
from torch import nn

from esper_adapters.pytorch import KasminaLayer, absorb_faults, advance_layers, wrap
from esper_functional import (
    BLENDS,
    Event,
    EventKind,
    SeedLifecycleState,
    fold_events,
    init_seeds,
    state_digest,
)
from tests.adapters.kernels import artifact, nan_kernel, root_kernel, torch_kernel
from tests.tolerance import assert_close

S = SeedLifecycleState
SOME_BAD = [[1, 2, 0], [-3, 1, 1], [0.5, 0.5, 0.5], [2, -1, 0]]
ROW_OK = [0, 2, 3]


def make_layer(kernel, alpha: float = 0.4, seed: int = 0, **options) -> KasminaLayer:
    torch.manual_seed(0)
    layer = KasminaLayer(3, 5, layer_name="fc", num_seeds=3, **options)
    layer.load_kernel_sync(seed, kernel, alpha=alpha)
    return layer


def bare_twin(layer: nn.Linear) -> nn.Linear:
    twin = nn.Linear(3, 5)
    twin.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return twin


def some_bad() -> torch.Tensor:
    return torch.tensor(SOME_BAD, requires_grad=True)


def fine() -> torch.Tensor:
    return torch.tensor(SOME_BAD).abs()


def backward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    y.square().sum().backward()
    return y.detach()


def absorb(layer: KasminaLayer, step: int = 0) -> list[Event]:
    return absorb_faults(layer._table, [layer], step)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_nan_kernel_leaves_the_hosts_output_and_gradients(alpha, blend):
    layer = make_layer(nan_kernel(), alpha, blend=blend)
    twin, x, y = bare_twin(layer), some_bad(), some_bad()
    assert_close(backward(layer, x), backward(twin, y))
    assert_close(x.grad, y.grad)
    assert_close(layer.weight.grad, twin.weight.grad)
    assert_close(layer.bias.grad, twin.bias.grad)
    for parameter in layer.kernel(0).parameters():
        assert not parameter.grad.any()


@pytest.mark.parametrize("blend", BLENDS)
def test_one_bad_example_costs_its_own_input_gradient_and_the_parameters(blend):
    layer = make_layer(root_kernel(), blend=blend)
    x, good, y = some_bad(), torch.tensor(SOME_BAD)[ROW_OK].requires_grad_(), some_bad()
    output = backward(layer, x)
    assert not layer.kernel(0).scale.grad.any()
    layer.zero_grad()
    assert_close(output[ROW_OK], backward(layer, good))
    assert_close(x.grad[ROW_OK], good.grad)
    assert layer.kernel(0).scale.grad.any()
    assert_close(output[1], backward(bare_twin(layer), y)[1])
    assert_close(x.grad[1], y.grad[1])


def test_three_failures_in_a_row_are_absorbed_into_recovery():
    layer, counts = make_layer(root_kernel()), []
    for _ in range(4):
        layer(some_bad())
        counts.append(layer.error_counts().tolist())
    assert counts == [[1], [2], [3], [3]]
    assert S(layer.seeds.stage[0, 0]) is S.ACTIVE
    (event,) = absorb(layer, step=7)
    assert (event.kind, event.value, event.step) == (EventKind.ERRORS, 3.0, 7)
    assert S(layer.seeds.stage[0, 0]) is S.ERROR_RECOVERY
    assert layer.seeds.fallback[0, 0]
    assert torch.equal(layer(some_bad()), bare_twin(layer)(some_bad()))
    assert absorb(layer) == []
    assert layer.error_counts().tolist() == []


def test_a_finite_step_starts_the_count_anew():
    layer, counts = make_layer(root_kernel()), []
    for x in (some_bad(), some_bad(), fine(), some_bad()):
        layer(x)
        counts += layer.error_counts().tolist()
    assert counts == [1, 2, 0, 1]


def test_a_latched_seed_has_stopped_before_it_is_absorbed():
    layer = make_layer(root_kernel())
    for _ in range(3):
        layer(some_bad())
    assert_close(layer(fine()).detach(), bare_twin(layer)(fine()).detach())
    assert layer.error_counts().tolist() == [3]


def test_evaluation_contains_and_does_not_count():
    layer = make_layer(root_kernel()).eval()
    for _ in range(5):
        with torch.no_grad():
            assert torch.isfinite(layer(some_bad())).all()
    assert layer.error_counts().tolist() == [0]
    assert absorb(layer) == []


def test_only_the_failing_seed_is_counted():
    layer = make_layer(torch_kernel(), 0.2)
    layer.load_kernel_sync(2, root_kernel(), alpha=0.2)
    layer(some_bad())
    assert layer.error_counts().tolist() == [0, 1]


def test_counts_survive_an_absorption_in_between():
    layer = make_layer(root_kernel())
    for step in range(3):
        layer(some_bad())
        assert [event.value for event in absorb(layer, step)] == [step + 1.0]
    assert S(layer.seeds.stage[0, 0]) is S.ERROR_RECOVERY


def test_a_fossil_falls_back_and_keeps_its_stage():
    layer = make_layer(root_kernel())
    layer.fossilize(0)
    for _ in range(3):
        layer(some_bad())
    absorb(layer)
    assert S(layer.seeds.stage[0, 0]) is S.FOSSILIZED
    assert torch.equal(layer(fine()), bare_twin(layer)(fine()))


def test_recovery_can_be_retried_with_another_kernel():
    layer = make_layer(root_kernel())
    for _ in range(3):
        layer(some_bad())
    absorb(layer)
    layer.load_kernel_sync(0, torch_kernel(), alpha=0.5)
    layer(some_bad())
    assert layer.error_counts().tolist() == [0]
    assert S(layer.seeds.stage[0, 0]) is S.ACTIVE
    assert not torch.equal(layer(fine()), bare_twin(layer)(fine()))


def test_one_absorption_covers_a_whole_model_and_is_heard():
    torch.manual_seed(0)
    kernels = {"a": root_kernel(), "b": torch_kernel(0, artifact("bottleneck", 5, 3))}
    ids = {"a" * 64: "a", "b" * 64: "b"}
    model = wrap(
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)),
        seeds_per_layer=2,
        resolve=lambda kernel_id: kernels[ids[kernel_id]],
    )
    heard: list[Event] = []
    model.seed_table.listeners.append(heard.append)
    model.load_kernel_sync("0", 1, "a" * 64)
    model.load_kernel_sync("1", 0, "b" * 64)
    for _ in range(3):
        model(some_bad())
    layers = list(model.kasmina_layers.values())
    events = absorb_faults(model.seed_table, layers, 9)
    assert [(e.layer, e.seed, e.value) for e in events] == [(0, 1, 3.0)]
    assert model.seeds.stage.tolist() == [[S.DORMANT, S.ERROR_RECOVERY], [S.ACTIVE, S.DORMANT]]
    assert state_digest(fold_events(init_seeds(2, 2), heard)) == state_digest(model.seeds)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.set_seed_alpha(0, 0.3),
        lambda layer: layer.load_kernel_sync(1, torch_kernel(), alpha=0.1),
    ],
    ids=["set alpha", "load another kernel"],
)
def test_failures_are_consecutive_across_a_change_of_the_layer(change):
    layer = make_layer(root_kernel())
    layer(some_bad())
    layer(some_bad())
    change(layer)
    layer(some_bad())
    absorb(layer)
    assert S(layer.seeds.stage[0, 0]) is S.ERROR_RECOVERY


def test_a_latched_seed_stays_stopped_when_the_layer_is_moved():
    layer = make_layer(root_kernel())
    for _ in range(3):
        layer(some_bad())
    layer.to("cpu")
    assert_close(layer(fine()).detach(), bare_twin(layer)(fine()).detach())


def test_a_ramp_that_ends_with_an_event_of_another_layer_reaches_its_end():
    kernels = {"a" * 64: torch_kernel(), "b" * 64: torch_kernel(0, artifact("bottleneck", 5, 3))}
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), resolve=kernels.__getitem__)
    model.load_kernel_sync("0", 0, "a" * 64, alpha=0.0)
    model.load_kernel_sync("1", 0, "b" * 64, alpha=0.5)
    first, second = model.kasmina_layers.values()
    first.apply_event(Event(0, 0, 0, EventKind.RAMP, value=1.0, span=10))
    second.apply_event(Event(10, 1, 0, EventKind.UNLOAD))
    advance_layers(model.seed_table, [first, second], 10)
    assert model.seeds.alpha[0, 0] == 1.0
    x = fine()
    assert torch.equal(first(x), first.capture(x)[0])


# The core, whose step is one program, counts a layer that is called twice once.
@pytest.mark.parametrize(
    ("order", "count"), [(("bad", "good"), 0), (("good", "bad"), 1), (("bad", "bad"), 2)]
)
def test_every_call_of_a_layer_counts_as_a_step(order, count):
    layer = make_layer(root_kernel())
    batches = {"bad": some_bad(), "good": fine()}
    sum(layer(batches[name]).sum() for name in order).backward()
    assert layer.error_counts().tolist() == [count]


def test_gradients_that_are_not_contained_are_torchs_own_and_outputs_are_contained():
    layer = make_layer(root_kernel(), contain=False)
    output = backward(layer, x := some_bad())
    assert torch.isfinite(output).all()
    assert layer.error_counts().tolist() == [1]
    assert torch.isnan(layer.kernel(0).scale.grad).all()
    assert torch.isnan(x.grad[1]).all()
    contained, x = make_layer(root_kernel()), fine().requires_grad_()
    backward(contained, x)
    free, y = make_layer(root_kernel(), contain=False), fine().requires_grad_()
    backward(free, y)
    assert torch.equal(x.grad, y.grad)
    for p, q in zip(contained.parameters(), free.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)

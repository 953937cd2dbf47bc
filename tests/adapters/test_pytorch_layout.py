"""The owner's view of a layer's seeds: tensors, queries, and changes that are events."""

import math

import numpy as np
import pytest
import torch

from esper.execution import KasminaStateLayout as ByTheOwnersName
from esper_adapters.pytorch import KasminaLayer, KasminaStateLayout
from esper_functional import (
    SeedIndexError,
    SeedLifecycleError,
    fold_events,
    init_seeds,
    kernel_id_words,
    state_digest,
)
from esper_functional import SeedLifecycleState as S
from tests.adapters.kernels import artifact, root_kernel, torch_kernel

ID = artifact().kernel_id


def make_layer() -> tuple[KasminaLayer, list]:
    torch.manual_seed(0)
    layer, heard = KasminaLayer(3, 5, num_seeds=3, layer_name="fc"), []
    layer.seed_table.listeners.append(heard.append)
    return layer, heard


def test_it_is_where_the_owner_put_it():
    assert ByTheOwnersName is KasminaStateLayout


def test_a_new_one_is_dormant_and_of_small_plain_dtypes():
    layout = KasminaStateLayout(4)
    shown = {
        "lifecycle_states": torch.uint8,
        "active_kernel_id": torch.int64,
        "alpha_blend": torch.float32,
        "health_accumulator": torch.float32,
        "last_update_epoch": torch.int32,
        "exec_latency_us": torch.float32,
        "error_count": torch.int32,
        "fallback_active": torch.bool,
    }
    for name, dtype in shown.items():
        tensor = getattr(layout, name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (4,)), name
        assert tensor.device == layout.device == torch.device("cpu")
    assert layout.get_dormant_seeds().all()
    assert not layout.get_active_seeds().any()
    assert not layout.has_active_seeds()
    assert math.isnan(layout.get_stats()["avg_health"])
    assert torch.isnan(layout.exec_latency_us).all()


def test_a_whole_life_by_the_owners_calls():
    layout = KasminaStateLayout(2)
    layout.transition_seed_state(1, S.LOADING, ID)
    words = kernel_id_words(ID)
    assert int(layout.active_kernel_id[1]) == (words[0] << 32) | (words[1] & 0xFFFFFFFF)
    assert int(layout.active_kernel_id[1]) == int(ID[:16], 16) >> 1
    layout.transition_seed_state(1, S.ACTIVE, ID)
    assert layout.get_active_seeds().tolist() == [False, True]
    assert layout.has_active_seeds()
    layout.update_telemetry(1, 250.0, 0.5)
    layout.update_telemetry(1, 150.0, 1.0)
    assert layout.exec_latency_us[1] == pytest.approx(240.0)
    assert layout.health_accumulator[1] == pytest.approx(0.55)
    assert [layout.increment_error_count(1) for _ in range(3)] == [1, 2, 3]
    assert S(int(layout.lifecycle_states[1])) is S.ERROR_RECOVERY
    assert layout.fallback_active.tolist() == [False, True]
    assert layout.get_stats() == {
        "num_seeds": 2,
        "dormant_seeds": 1,
        "loading_seeds": 0,
        "active_seeds": 0,
        "error_recovery_seeds": 1,
        "fossilized_seeds": 0,
        "fallback_seeds": 1,
        "total_errors": 3,
        "avg_health": pytest.approx(0.55),
        "avg_latency_us": pytest.approx(240.0),
    }
    layout.reset_seed(1)
    assert layout.get_dormant_seeds().all()
    assert layout.error_count.tolist() == [0, 0]
    layout.reset_seed(1)


@pytest.mark.parametrize("stage", list(S))
@pytest.mark.parametrize("target", list(S))
def test_moves_are_those_of_the_table(stage, target):
    legal = {
        (S.DORMANT, S.LOADING), (S.LOADING, S.ACTIVE), (S.LOADING, S.DORMANT),
        (S.LOADING, S.ERROR_RECOVERY), (S.ACTIVE, S.DORMANT), (S.ACTIVE, S.ERROR_RECOVERY),
        (S.ACTIVE, S.FOSSILIZED), (S.ERROR_RECOVERY, S.DORMANT), (S.ERROR_RECOVERY, S.LOADING),
    }  # fmt: skip
    layout = KasminaStateLayout(1)
    ways = {
        S.DORMANT: (),
        S.LOADING: (S.LOADING,),
        S.ACTIVE: (S.LOADING, S.ACTIVE),
        S.ERROR_RECOVERY: (S.LOADING, S.ERROR_RECOVERY),
        S.FOSSILIZED: (S.LOADING, S.ACTIVE, S.FOSSILIZED),
    }
    for step in ways[stage]:
        layout.transition_seed_state(0, step)
    if (stage, target) in legal:
        layout.transition_seed_state(0, target)
        assert int(layout.lifecycle_states[0]) == target
        return
    with pytest.raises(SeedLifecycleError, match=f"seed 0 of layer 'layer' is {stage.name} and"):
        layout.transition_seed_state(0, target)
    assert int(layout.lifecycle_states[0]) == stage


def test_a_layers_own_shows_its_seeds_and_changes_them_by_events():
    layer, heard = make_layer()
    layout = layer.state_layout
    layer.load_kernel_sync(2, torch_kernel(), alpha=0.25)
    assert layout.get_active_seeds().tolist() == [False, False, True]
    assert layout.alpha_blend.tolist() == [0.0, 0.0, 0.25]
    layout.alpha_blend[2] = 1.0
    assert layer.seeds.alpha[0, 2] == np.float32(0.25)
    x = torch.randn(4, 3)
    host = torch.nn.functional.linear(x, layer.weight, layer.bias)
    layout.update_telemetry(2, 12.5, 1.0)
    layout.increment_error_count(2)
    assert layer.error_counts().tolist() == [1]
    layer(x)
    assert layer.error_counts().tolist() == [0]
    layout.transition_seed_state(2, S.ERROR_RECOVERY)
    assert torch.equal(layer(x), host)
    layout.reset_seed(2)
    assert layer.kernel(2) is None
    assert state_digest(fold_events(init_seeds(1, 3), heard)) == state_digest(layer.seeds)


def test_the_row_of_a_wrapped_models_layer_is_its_own():
    from esper_adapters.pytorch import wrap

    host = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3))
    model = wrap(host, seeds_per_layer=2)
    model.load_kernel_sync("1", 1, torch_kernel(0, artifact("bottleneck", 5, 3)), alpha=0.5)
    layers = model.kasmina_layers
    assert not layers["0"].state_layout.has_active_seeds()
    assert layers["1"].state_layout.get_active_seeds().tolist() == [False, True]
    layers["1"].state_layout.reset_seed(1)
    assert (np.asarray(model.seeds.stage) == S.DORMANT).all()


def test_what_is_wrong_is_refused_and_changes_nothing():
    layer, _ = make_layer()
    layer.load_kernel_sync(0, root_kernel())
    layout, digest = layer.state_layout, state_digest(layer.seeds)
    for seed in (-1, 3):
        for change in (
            lambda seed=seed: layout.transition_seed_state(seed, S.LOADING),
            lambda seed=seed: layout.increment_error_count(seed),
            lambda seed=seed: layout.update_telemetry(seed, 1.0, 1.0),
            lambda seed=seed: layout.reset_seed(seed),
        ):
            with pytest.raises(SeedIndexError, match=f"no seed {seed} in layer 'fc': it has 3"):
                change()
    with pytest.raises(SeedLifecycleError, match=r"health takes values in \[0, 1\]"):
        layout.update_telemetry(0, 1.0, 1.5)
    with pytest.raises(SeedLifecycleError, match="latency is counted in µs from 0"):
        layout.update_telemetry(0, -1.0, 1.0)
    with pytest.raises(SeedLifecycleError, match="of seeds that run"):
        layout.increment_error_count(1)
    assert state_digest(layer.seeds) == digest
    layout.transition_seed_state(1, S.LOADING, ID)
    with pytest.raises(ValueError, match="needs the kernel that it grafts: use load_kernel"):
        layout.transition_seed_state(1, S.ACTIVE, ID)
    assert S(int(layout.lifecycle_states[1])) is S.LOADING


def test_stats_of_a_layer_name_each_kernel_its_route_and_its_seeds():
    layer, _ = make_layer()
    layer.load_kernel_sync(1, torch_kernel(), alpha=0.25)
    stats = layer.get_layer_stats()
    # What was not measured is NaN, which is not equal to itself.
    assert str(stats) == str(layer.get_stats())
    assert stats["layer_name"] == "fc"
    assert stats["state_stats"]["active_seeds"] == 1
    own = stats["kernels"][1]
    assert (own["kernel_id"], own["route"], own["stage"]) == (ID, "torchscript", "ACTIVE")
    assert own["alpha"] == 0.25
    assert own["parameters"] == sum(p.numel() for p in layer.kernel(1).parameters())
    assert math.isnan(own["health"])
    assert math.isnan(own["latency_us"])

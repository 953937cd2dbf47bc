"""What a wrapped torch model tells of itself: its state, its events, its statistics."""

from typing import Any

import torch
from torch import nn

from esper_adapters.pytorch import wrap
from esper_functional import Event
from tests.adapters.kernels import artifact, torch_kernel
from tests.tolerance import assert_close

GOOD = "a" * 64


def make_model() -> Any:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5))
    return wrap(host, resolve=lambda _: torch_kernel(), seeds_per_layer=2)


def inputs() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 3)


def test_events_of_two_layers_share_one_state():
    model = make_model()
    model.load_kernel_sync("0", 1, GOOD)
    assert model[0].seeds is model[2].seeds is model.seeds
    assert (model[0].row, model[2].row) == (0, 1)
    assert model.seeds.slot.tolist() == [[-1, 1], [-1, -1]]
    assert isinstance(model.seed_table.state, type(model.seeds))
    assert model.seed_table.names == ("0", "2")


def test_the_comparison_with_the_original_is_the_difference_the_kernels_make():
    model, x = make_model(), inputs()
    assert model.compare_with_original(x) == {"max_abs": 0.0, "mean_abs": 0.0}
    bare = model(x).detach()
    model.load_kernel_sync("0", 0, GOOD, alpha=0.5)
    gap = (model(x).detach() - bare).abs()
    found = model.compare_with_original(x)
    assert_close(torch.tensor(found["max_abs"]), gap.max())
    assert_close(torch.tensor(found["mean_abs"]), gap.mean())
    assert model.training
    assert model[0].error_counts().tolist() == [0]


def test_the_comparison_keeps_the_mode_of_each_module():
    model = make_model()
    model[1].eval()
    model.compare_with_original(inputs())
    assert [module.training for module in model] == [True, False, True]


def test_the_stats_count_layers_seeds_and_parameters():
    model = make_model()
    model.load_kernel_sync("0", 0, GOOD)
    model.load_kernel_sync("0", 1, GOOD)
    model.fossilize("0", 1)
    assert model.get_model_stats() == {
        "layers": 2,
        "seeds": 4,
        "seeds_by_stage": {
            "DORMANT": 2,
            "LOADING": 0,
            "ACTIVE": 1,
            "ERROR_RECOVERY": 0,
            "FOSSILIZED": 1,
        },
        "host_parameters": 3 * 5 + 5 + 5 * 5 + 5,
        "kernel_parameters": 2 * sum(p.size for p in artifact().params.values()),
        "kernels_by_route": {"torchscript": 2},
    }


def test_listeners_hear_each_event_once_in_order():
    model, heard = make_model(), []
    model.seed_table.listeners.append(heard.append)
    model.load_kernel_sync("0", 0, GOOD, step=1)
    model.set_seed_alpha("0", 0, 0.75, step=2)
    model.unload_kernel_sync("0", 0, step=3)
    assert all(isinstance(event, Event) for event in heard)
    assert [(e.step, e.kind.value) for e in heard] == [
        (1, "load"),
        (1, "activate"),
        (2, "alpha"),
        (3, "unload"),
    ]

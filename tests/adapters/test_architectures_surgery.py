"""Models as people build them, later on: hosts that have run, states, shadows, plain exports."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from esper_adapters.pytorch import SeededLayer, export_plain, unwrap, wrap
from esper_functional import KasminaException
from tests.adapters.architectures import ARCHITECTURES
from tests.adapters.grafting import (
    THIRD_PARTY_WARNINGS,
    assert_same_bits,
    examples,
    grafted,
    kernel_for,
    learnt,
    made,
    seeded,
    seen,
    targets_of,
)
from tests.tolerance import assert_close

pytestmark = THIRD_PARTY_WARNINGS

each = pytest.mark.parametrize("name", ARCHITECTURES)
each_target = pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name, own in ARCHITECTURES.items() for target in own.targets],
)


def first_target(name: str) -> str:
    return next(iter(ARCHITECTURES[name].targets))


@each
def test_a_host_that_has_run_is_wrapped_and_unwrapped_like_any(name):
    own, host = made(name)
    learnt(own, host, True)
    model = wrap(host, target_layers=targets_of(name, "every layer"))
    learnt(own, model, True)
    back = unwrap(model)
    assert type(back) is type(host)
    assert_same_bits(seen(own, model), seen(own, host))
    assert_same_bits(seen(own, back), seen(own, host))


@each
def test_its_state_dict_carries_a_graft_to_another_wrapping(name):
    own, _, model = seeded(name, first_target(name))
    path, (x, h) = next(iter(examples(own, model).items()))
    kernel = kernel_for(model.kasmina_layers[path], x, h)
    kernel = dataclasses.replace(kernel, kernel_id="a" * 64)

    def wrapped() -> Any:
        targets = targets_of(name, first_target(name))
        return wrap(made(name)[1], target_layers=targets, resolve=lambda _: kernel)

    saved, other = wrapped(), wrapped()
    SeededLayer.load_kernel_sync(saved.kasmina_layers[path], 0, kernel, alpha=0.3)
    learnt(own, saved, True)
    with torch.no_grad():
        for p in saved.parameters():
            p.add_(0.01)
    other.load_state_dict(saved.state_dict())
    assert_same_bits(seen(own, other), seen(own, saved))


@each
def test_shadows_teach_an_incubating_kernel_and_nothing_else(name):
    own, _, model = seeded(name, first_target(name))
    bare = seen(own, model)
    layer = grafted(own, model, alpha=0.0)
    SeededLayer.incubate(layer, 0)
    assert_same_bits(seen(own, model), bare)
    model.train()
    torch.manual_seed(1)
    (shadow,) = model.shadow_forward(**own.options())
    if name == "Llama, checkpointed":
        # The backward pass computes the model again, and not its shadow.
        with pytest.raises(CheckpointError):
            own.loss(shadow).backward()
        return
    own.loss(shadow).backward()
    kernel: Any = layer.kernel(0)
    taught = {key for key, p in model.named_parameters() if p.grad is not None}
    own_keys = {
        key for key, p in model.named_parameters() if any(p is q for q in kernel.parameters())
    }
    assert taught == own_keys


def exported(model: nn.Module) -> tuple[nn.Module | None, str]:
    """The plain model, or why there is none."""
    try:
        return export_plain(model), ""
    except KasminaException as refusal:
        return None, str(refusal)


@each_target
def test_exported_it_is_what_it_was_or_is_refused_by_name(name, target):
    own, host, model = seeded(name, target)
    layer = grafted(own, model)
    grown = seen(own, model)
    plain, refusal = exported(model)
    if plain is None:
        assert type(host.get_submodule(layer.layer_name)).__name__ in refusal
        return
    for a, b in zip(seen(own, plain), grown, strict=True):
        assert_close(a, b)


@each
def test_what_kernels_do_is_measured_of_all_that_a_model_returns(name):
    own, host, model = seeded(name, first_target(name))
    grafted(own, model)
    torch.manual_seed(1)
    gap = model.compare_with_original(**own.options())
    pairs = zip(seen(own, model), seen(own, host), strict=True)
    expected = max(float((a - b).abs().max()) for a, b in pairs if a.is_floating_point())
    assert gap["max_abs"] == pytest.approx(expected, rel=1e-4)
    assert 0 < gap["mean_abs"] <= gap["max_abs"]


@pytest.mark.parametrize("name", [name for name, own in ARCHITECTURES.items() if own.generate])
def test_a_model_of_transformers_is_saved_as_what_its_host_is(name, tmp_path):
    own, host, model = seeded(name, first_target(name))
    model.save_pretrained(tmp_path)
    back = type(host).from_pretrained(tmp_path)
    assert_same_bits(seen(own, back), seen(own, host))
    assert back.config.architectures == [type(host).__name__]


@each
def test_copies_are_their_own(name):
    own, _, model = seeded(name, first_target(name))
    grafted(own, model)
    grown = seen(own, model)
    twin = copy.deepcopy(model)
    assert_same_bits(seen(own, twin), grown)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert_same_bits(seen(own, twin), grown)
    assert any(not torch.equal(a, b) for a, b in zip(seen(own, model), grown, strict=True))

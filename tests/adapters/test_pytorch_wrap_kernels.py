"""Kernels in a wrapped torch model: loading by id, with and without an event loop."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from esper_adapters.pytorch import TorchKernel, wrap
from esper_functional import (
    BlendError,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleError,
    SeedLifecycleState,
    fold_events,
    init_seeds,
    kernel_id_words,
    state_digest,
)
from tests.adapters.kernels import artifact, torch_kernel

S = SeedLifecycleState
GOOD, WIDE, BROKEN, MISSING, ODD = ("a" * 64, "b" * 64, "c" * 64, "d" * 64, "e" * 64)


def resolve(kernel_id: str) -> TorchKernel:
    if kernel_id == BROKEN:
        raise KasminaException("kernel cccc is damaged")
    if kernel_id == ODD:
        raise OSError("the disk is gone")
    return {GOOD: torch_kernel(), WIDE: torch_kernel(0, artifact("bottleneck", 3, 4))}[kernel_id]


def sync_load(model: Any, *args: Any, **options: Any) -> bool:
    return model.load_kernel_sync(*args, **options)


def async_load(model: Any, *args: Any, **options: Any) -> bool:
    return asyncio.run(model.load_kernel(*args, **options))


both_ways = pytest.mark.parametrize("load", [sync_load, async_load])
Load = Callable[..., bool]


def make_model(**options: Any) -> Any:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5))
    return wrap(host, **{"resolve": resolve, "seeds_per_layer": 2, **options})


def inputs() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 3)


def stage(model: Any, seed: int = 0) -> S:
    return S(int(model.seeds.stage[0, seed]))


@both_ways
def test_a_load_grafts_and_the_state_is_the_fold_of_what_was_heard(load: Load):
    model, heard = make_model(), []
    model.seed_table.listeners.append(heard.append)
    assert load(model, "0", 1, GOOD, alpha=0.25, step=4)
    assert stage(model, 1) is S.ACTIVE
    assert model.seeds.alpha[0, 1] == 0.25
    assert model.seeds.last_update[0, 1] == 4
    assert tuple(model.seeds.kernel_id[0, 1]) == kernel_id_words(GOOD)
    assert [e.kind.value for e in heard] == ["load", "activate"]
    assert state_digest(fold_events(init_seeds(2, 2), heard)) == state_digest(model.seeds)


def test_both_ways_end_in_the_same_model():
    first, second = make_model(), make_model()
    for model, load in ((first, sync_load), (second, async_load)):
        load(model, "0", 0, GOOD)
    assert torch.equal(first(inputs()), second(inputs()))
    assert state_digest(first.seeds) == state_digest(second.seeds)


@both_ways
def test_a_kernel_that_is_not_there_gives_false_and_a_dormant_seed(load: Load):
    model, heard = make_model(), []
    model.seed_table.listeners.append(heard.append)
    assert load(model, "0", 0, MISSING) is False
    assert stage(model) is S.DORMANT
    assert [e.kind.value for e in heard] == ["load", "cancel"]
    assert load(model, "0", 0, GOOD)


@both_ways
def test_a_kernel_that_cannot_be_read_raises_and_can_be_retried(load: Load):
    model = make_model()
    with pytest.raises(KasminaException, match="cccc is damaged"):
        load(model, "0", 0, BROKEN)
    assert stage(model) is S.ERROR_RECOVERY
    assert load(model, "0", 0, GOOD)
    assert stage(model) is S.ACTIVE


@both_ways
def test_a_kernel_that_does_not_fit_raises_and_leaves_the_model(load: Load):
    model = make_model()
    keys, before = list(model.state_dict()), model(inputs())
    with pytest.raises(
        KernelMismatchError, match="fit layer '0': expected 3->5 float32, found 3->4 float32"
    ):
        load(model, "0", 0, WIDE)
    assert stage(model) is S.DORMANT
    assert list(model.state_dict()) == keys
    assert torch.equal(model(inputs()), before)


@both_ways
def test_a_model_without_a_library_says_how_to_get_one(load: Load):
    with pytest.raises(KasminaException, match="pass `library=` to esper.wrap"):
        load(make_model(resolve=None), "0", 0, GOOD)


@both_ways
def test_an_unknown_layer_is_refused_with_the_nearest(load: Load):
    host = nn.ModuleDict({"encoder": nn.Linear(3, 5), "head": nn.Linear(5, 3)})
    model = wrap(host, resolve=resolve)
    with pytest.raises(SeedIndexError, match=r"called 'encodr'.*nearest are \['encoder'\]"):
        load(model, "encodr", 0, GOOD)
    with pytest.raises(SeedIndexError, match="called 'encodr'"):
        model.set_seed_alpha("encodr", 0, 0.5)


@both_ways
@pytest.mark.parametrize("seed", [-1, 2])
def test_a_seed_that_is_not_there(load: Load, seed: int):
    model = make_model()
    with pytest.raises(SeedIndexError, match=f"no seed {seed} in layer '0': it has 2"):
        load(model, "0", seed, GOOD)
    assert state_digest(model.seeds) == state_digest(init_seeds(2, 2))


@both_ways
def test_a_seed_that_is_busy_is_refused_and_keeps_its_kernel(load: Load):
    model = make_model()
    load(model, "0", 0, GOOD)
    before = state_digest(model.seeds)
    with pytest.raises(SeedLifecycleError, match="seed 0 of layer '0' is ACTIVE and cannot load"):
        load(model, "0", 0, GOOD)
    assert state_digest(model.seeds) == before


@both_ways
def test_a_first_alpha_outside_its_range_changes_nothing(load: Load):
    model = make_model()
    with pytest.raises(BlendError, match=r"alpha must be in \[0, 1\], got 1\.5"):
        load(model, "0", 0, GOOD, alpha=1.5)
    assert stage(model) is S.DORMANT


@both_ways
def test_an_unforeseen_error_does_not_leave_the_seed_loading(load: Load):
    model = make_model()
    with pytest.raises(OSError, match="the disk is gone"):
        load(model, "0", 0, ODD)
    assert stage(model) is not S.LOADING


def test_a_cancelled_load_does_not_leave_the_seed_loading():
    async def cancelled(model: Any) -> None:
        task = asyncio.create_task(model.load_kernel("0", 0, GOOD))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    model = make_model()
    asyncio.run(cancelled(model))
    assert stage(model) is not S.LOADING


def test_a_whole_life():
    model, x = make_model(), inputs()
    bare = model(x).detach()
    model.load_kernel_sync("0", 0, GOOD, alpha=0.5)
    assert not torch.equal(model(x), bare)
    model.set_seed_alpha("0", 0, 0.0)
    assert torch.equal(model(x), bare)
    assert asyncio.run(model.unload_kernel("0", 0))
    assert torch.equal(model(x), bare)
    model.load_kernel_sync("0", 0, GOOD, alpha=0.5)
    model.fossilize("0", 0)
    with pytest.raises(SeedLifecycleError, match="layer '0' is FOSSILIZED and cannot unload"):
        model.unload_kernel_sync("0", 0)

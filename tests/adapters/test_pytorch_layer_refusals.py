"""What a KasminaLayer refuses: each says what was wrong, and changes nothing."""

import pytest
import torch

from esper_adapters.pytorch import KasminaLayer
from esper_functional import (
    BlendError,
    Event,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleError,
    fold_events,
    init_seeds,
    state_digest,
)
from tests.adapters.kernels import artifact, torch_kernel


def make_layer(**options) -> KasminaLayer:
    return KasminaLayer(3, 5, **{"layer_name": "fc", "num_seeds": 3, **options})


@pytest.mark.parametrize("seed", [-1, 3])
def test_a_seed_that_is_not_there(seed):
    layer = make_layer()
    for change in (
        lambda: layer.load_kernel_sync(seed, torch_kernel()),
        lambda: layer.set_seed_alpha(seed, 0.5),
    ):
        with pytest.raises(SeedIndexError, match=f"no seed {seed} in layer 'fc': it has 3"):
            change()


@pytest.mark.parametrize("shape", [(4, 5), (3, 4)])
def test_a_kernel_that_does_not_fit_is_refused_and_nothing_changes(shape):
    layer, kernel = make_layer(), torch_kernel(0, artifact("bottleneck", *shape))
    before = state_digest(layer.seeds)
    with pytest.raises(
        KernelMismatchError,
        match=rf"fit layer 'fc': expected 3->5 float32, found {shape[0]}->{shape[1]} float32",
    ):
        layer.load_kernel_sync(0, kernel)
    assert state_digest(layer.seeds) == before
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_another_dtype_is_refused():
    with pytest.raises(KernelMismatchError, match="expected 3->5 float64, found 3->5 float32"):
        make_layer(dtype=torch.float64).load_kernel_sync(0, torch_kernel())


def test_what_the_stage_forbids_is_refused_and_nothing_changes():
    layer = make_layer()
    with pytest.raises(
        SeedLifecycleError, match="seed 1 of layer 'fc' is DORMANT.*unload: it may load"
    ):
        layer.unload_kernel_sync(1)
    layer.load_kernel_sync(1, torch_kernel())
    before = state_digest(layer.seeds)
    for alpha in (1.5, -0.1, float("nan")):
        with pytest.raises(SeedLifecycleError, match=r"with value .*values in \[0, 1\]"):
            layer.set_seed_alpha(1, alpha)
    with pytest.raises(SeedLifecycleError, match="is ACTIVE and cannot load"):
        layer.load_kernel_sync(1, torch_kernel())
    with pytest.raises(BlendError, match=r"alpha must be in \[0, 1\], got 1\.5"):
        layer.load_kernel_sync(0, torch_kernel(), alpha=1.5)
    assert state_digest(layer.seeds) == before
    assert layer.kernel(0) is None


def test_a_refused_load_is_not_heard():
    layer, heard = make_layer(), []
    layer._table.listeners.append(heard.append)
    with pytest.raises(BlendError):
        layer.load_kernel_sync(0, torch_kernel(), alpha=1.5)
    assert heard == []
    assert state_digest(fold_events(init_seeds(1, 3), heard)) == state_digest(layer.seeds)


def test_an_activation_needs_its_kernel_and_a_layer_its_blend():
    with pytest.raises(ValueError, match="ACTIVATE event needs the kernel"):
        make_layer().apply_event(Event(0, 0, 0, EventKind.ACTIVATE))
    with pytest.raises(BlendError, match="did you mean 'convex'"):
        make_layer(blend="convexx")


def test_what_is_no_kernel_is_refused():
    with pytest.raises(
        KernelMismatchError, match="takes an artifact's id or a TorchKernel; got Linear: make one"
    ):
        make_layer().load_kernel_sync(0, torch.nn.Linear(3, 5))


def test_an_id_needs_something_to_find_it_with():
    layer = make_layer()
    with pytest.raises(KasminaException, match="where there is a library: pass `library=`"):
        layer.load_kernel_sync(0, "ab" * 32)


def test_a_cache_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="cache_size_mb must be at least 0, got -1"):
        make_layer(cache_size_mb=-1)

"""Equinox: kernels by their id, and what is refused."""

import equinox as eqx
import jax
import numpy as np
import pytest

from esper_adapters.equinox import Resolved, SeededModel, wrap
from esper_functional import (
    BlendError,
    Event,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleError,
    kernel_id_words,
)
from tests.adapters.kernels import jax_kernel
from tests.tolerance import assert_close

ID = "ab" * 32


def host() -> eqx.nn.MLP:
    return eqx.nn.MLP(3, 2, width_size=5, depth=1, key=jax.random.key(0))


def grafted() -> SeededModel:
    return wrap(host()).load_kernel("layers.0", 1, jax_kernel(), alpha=0.4)


def test_kernels_are_found_by_their_id():
    library = {ID: Resolved(jax_kernel(), confidence=0.9)}
    model = wrap(host(), resolve=library.__getitem__)
    after = model.load_kernel("layers.0", 0, ID)
    assert tuple(after.seeds.kernel_id[0, 0]) == kernel_id_words(ID)
    assert after.seeds.alpha[0, 0] == 0.5
    assert_close(model.load_kernel("layers.0", 0, jax_kernel()).seeds.alpha[0, 0], np.float32(0.3))
    with pytest.raises(LookupError):
        model.load_kernel("layers.0", 0, "cd" * 32)
    with pytest.raises(KasminaException, match="pass `library=` to esper.wrap"):
        wrap(host()).load_kernel("layers.0", 0, ID)


def test_what_does_not_fit_or_is_forbidden_is_refused():
    model = grafted()
    with pytest.raises(
        KernelMismatchError, match=r"seed 0 of layer 'layers.1': expected input \(5,\)"
    ):
        model.load_kernel("layers.1", 0, jax_kernel())
    with pytest.raises(SeedLifecycleError, match="seed 1 of layer 'layers.0' is ACTIVE"):
        model.load_kernel("layers.0", 1, jax_kernel())
    with pytest.raises(SeedLifecycleError, match="seed 0 of layer 'layers.0' is DORMANT"):
        model.unload_kernel("layers.0", 0)
    with pytest.raises(SeedLifecycleError, match=r"alpha to 1\.5"):
        model.set_seed_alpha("layers.0", 1, 1.5)
    with pytest.raises(SeedLifecycleError, match="FOSSILIZED and cannot unload"):
        model.fossilize("layers.0", 1).unload_kernel("layers.0", 1)
    with pytest.raises(SeedIndexError, match="no seed 4 in layer 'layers.0': it has 4"):
        model.load_kernel("layers.0", 4, jax_kernel())
    with pytest.raises(SeedIndexError, match=r"called 'layer.0'.*nearest are \['layers.0'"):
        model.load_kernel("layer.0", 0, jax_kernel())
    with pytest.raises(SeedLifecycleError, match="DORMANT and cannot activate"):
        model.apply_event(Event(0, 0, 0, EventKind.ACTIVATE))
    loading = model.apply_event(Event(0, 0, 0, EventKind.LOAD))
    with pytest.raises(ValueError, match="ACTIVATE event needs the kernel"):
        loading.apply_event(Event(0, 0, 0, EventKind.ACTIVATE))
    with pytest.raises(BlendError, match=r"alpha must be in \[0, 1\], got 1\.5"):
        model.load_kernel("layers.0", 0, jax_kernel(), alpha=1.5)


def test_an_activation_of_a_layer_that_is_not_there():
    with pytest.raises(SeedIndexError, match="no layer 7"):
        wrap(host()).apply_event(Event(0, 7, 0, EventKind.ACTIVATE), jax_kernel())


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(KasminaException, match="wrapped already; esper.unwrap it first"):
        wrap(grafted())
    with pytest.raises(
        SeedIndexError, match="no linear layer of type Linear; it is made of LayerNorm"
    ):
        wrap(eqx.nn.LayerNorm(3))
    with pytest.raises(SeedIndexError, match="seeds_per_layer must be at least 1, got 0"):
        wrap(host(), seeds_per_layer=0)
    with pytest.raises(BlendError, match="did you mean 'convex'"):
        wrap(host(), blend="conves")

"""What cannot be wrapped, loaded or done is refused with a message, and nothing changes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import (
    BlendError,
    Event,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleError,
    kernel_from_function,
    kernel_id_words,
    state_digest,
)
from tests.adapters.faces import EQUINOX, FLAX, X, arrays, dense, dense_kernel, each_face
from tests.adapters.hosts import equinox_images, flax_images, scaled_kernel
from tests.tolerance import assert_bitwise, assert_close

ID = "ab" * 32


def grafted(face):
    return face.wrap().load_kernel("layers.0", 1, dense_kernel(), alpha=0.4)


def refuses(kind, message, model, change):
    """`change` raises, and the model is what it was."""
    before = state_digest(model.seeds), set(model.kernels), arrays(model.module)
    with pytest.raises(kind, match=message):
        change(model)
    assert (state_digest(model.seeds), set(model.kernels)) == before[:2]
    assert_bitwise(arrays(model.module), before[2])


@each_face
def test_kernels_are_found_by_their_id(face):
    library = {ID: face.api.Resolved(dense_kernel(), confidence=0.9)}
    model = face.wrap(resolve=library.__getitem__)
    after = model.load_kernel("layers.0", 0, ID)
    assert tuple(after.seeds.kernel_id[0, 0]) == kernel_id_words(ID)
    assert after.seeds.alpha[0, 0] == 0.5
    assert_close(
        model.load_kernel("layers.0", 0, dense_kernel()).seeds.alpha[0, 0], np.float32(0.3)
    )
    refuses(LookupError, "cdcd", model, lambda m: m.load_kernel("layers.0", 0, "cd" * 32))
    refuses(
        KasminaException,
        "wrapped without a library: pass `library=` to esper.wrap",
        face.wrap(),
        lambda m: m.load_kernel("layers.0", 0, ID),
    )


@each_face
@pytest.mark.parametrize(
    ("kind", "message", "change"),
    [
        (
            KernelMismatchError,
            r"seed 0 of layer 'layers\.1': expected input \(5,\) -> output \(2,\) of float32",
            lambda m: m.load_kernel("layers.1", 0, dense_kernel()),
        ),
        (
            KernelMismatchError,
            r"seed 0 of layer 'layers\.0': .* its output is \(4,\) of float32",
            lambda m: m.load_kernel("layers.0", 0, dense_kernel(0, 3, 4)),
        ),
        (
            KernelMismatchError,
            "of layer 'layers.0': expected .* refused such an input",
            lambda m: m.load_kernel("layers.0", 0, dense_kernel(dtype=jnp.bfloat16)),
        ),
        (
            SeedLifecycleError,
            "seed 1 of layer 'layers.0' is ACTIVE",
            lambda m: m.load_kernel("layers.0", 1, dense_kernel()),
        ),
        (
            SeedLifecycleError,
            "seed 0 of layer 'layers.0' is DORMANT",
            lambda m: m.unload_kernel("layers.0", 0),
        ),
        (
            SeedLifecycleError,
            r"alpha with value 1\.5",
            lambda m: m.set_seed_alpha("layers.0", 1, 1.5),
        ),
        (
            SeedLifecycleError,
            "FOSSILIZED and cannot unload",
            lambda m: m.fossilize("layers.0", 1).unload_kernel("layers.0", 1),
        ),
        (
            SeedLifecycleError,
            "cannot incubate.* incubates while ACTIVE at alpha 0",
            lambda m: m.incubate("layers.0", 1),
        ),
        (
            SeedIndexError,
            "no seed 4 in layer 'layers.0': it has 4",
            lambda m: m.load_kernel("layers.0", 4, dense_kernel()),
        ),
        (
            SeedIndexError,
            "no seed -1 in layer 'layers.0'",
            lambda m: m.load_kernel("layers.0", -1, dense_kernel()),
        ),
        (
            SeedIndexError,
            r"called 'layer\.0'.*nearest are \['layers\.0'",
            lambda m: m.load_kernel("layer.0", 0, dense_kernel()),
        ),
        (
            SeedIndexError,
            r"called 'zzz': there are \['layers\.0', 'layers\.1'\]",
            lambda m: m.unload_kernel("zzz", 0),
        ),
        (
            SeedLifecycleError,
            "DORMANT and cannot activate",
            lambda m: m.apply_event(Event(0, 0, 0, EventKind.ACTIVATE)),
        ),
        (
            ValueError,
            "ACTIVATE event needs the kernel",
            lambda m: m.apply_event(Event(0, 0, 0, EventKind.LOAD)).apply_event(
                Event(0, 0, 0, EventKind.ACTIVATE)
            ),
        ),
        (
            BlendError,
            r"alpha must be in \[0, 1\], got 1\.5",
            lambda m: m.load_kernel("layers.0", 0, dense_kernel(), alpha=1.5),
        ),
        (
            BlendError,
            r"alpha must be in \[0, 1\], got nan",
            lambda m: m.load_kernel("layers.0", 0, dense_kernel(), alpha=float("nan")),
        ),
        (
            SeedIndexError,
            "no layer 7",
            lambda m: m.apply_event(Event(0, 7, 0, EventKind.ACTIVATE), dense_kernel()),
        ),
    ],
)
def test_what_does_not_fit_or_is_forbidden(face, kind, message, change):
    refuses(kind, message, grafted(face), change)


@each_face
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"seeds_per_layer": 0}, SeedIndexError, "seeds_per_layer must be at least 1, got 0"),
        ({"blend": "conves"}, BlendError, "did you mean 'convex'"),
        ({"target_layers": []}, SeedIndexError, "target_layers is empty"),
        ({"target_layers": ["layer.0"]}, SeedIndexError, r"nearest are \['layers.0'"),
        ({"target_layers": [int]}, SeedIndexError, "no layer of type int: it is made of"),
    ],
)
def test_what_wrap_refuses(face, options, kind, message):
    with pytest.raises(kind, match=message):
        face.wrap(**options)


@each_face
def test_what_is_wrapped_is_not_wrapped_again(face):
    with pytest.raises(KasminaException, match=r"wrapped already; esper\.unwrap it first"):
        face.wrap(grafted(face))
    with pytest.raises(KasminaException, match=r"has grafted layers: .* esper\.unwrap gives"):
        face.wrap(grafted(face).module)


@each_face
def test_with_an_example_every_site_refuses_what_does_not_fit(face):
    host = equinox_images() if face is EQUINOX else flax_images()
    model = face.wrap(host.module, target_layers=host.types, example=host.example)
    inputs, outputs = ((2, 4, 4), (3, 4, 4)) if face is EQUINOX else ((4, 4, 2), (4, 4, 3))
    wrong = (*outputs[:2], 7)
    refuses(
        KernelMismatchError,
        rf"layer 'layers\.0': expected input \({inputs[0]}, .*; its output is \({wrong[0]}, ",
        model,
        lambda m: m.load_kernel("layers.0", 0, scaled_kernel(inputs, wrong)),
    )
    model.load_kernel("layers.0", 0, scaled_kernel(inputs, outputs))


@each_face
def test_an_example_may_be_of_shapes_alone(face):
    host = equinox_images() if face is EQUINOX else flax_images()
    (x,) = host.example
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
    model = face.wrap(host.module, target_layers=host.types, example=(spec,))
    known = face.wrap(host.module, target_layers=host.types, example=host.example)
    assert model.signatures == known.signatures
    assert set(model.signatures) == set(model.sites)


@each_face
def test_without_one_it_is_refused_when_it_is_traced(face):
    host = equinox_images() if face is EQUINOX else flax_images()
    model = face.wrap(host.module, target_layers=host.types)
    inputs, outputs = ((2, 4, 4), (3, 4, 4)) if face is EQUINOX else ((4, 4, 2), (4, 4, 3))
    wrong = model.load_kernel("layers.0", 0, scaled_kernel(inputs, (*outputs[:2], 7)))
    with pytest.raises(KernelMismatchError, match=r"where its host layer 'layers\.0' returns"):
        host.apply(wrong.module, host.x)
    ranks = model.load_kernel("layers.0", 0, kernel_from_function(dense, {}, example_rank=9))
    with pytest.raises(KernelMismatchError, match=r"of rank 9, and layer 'layers\.0' gives it"):
        host.apply(ranks.module, host.x)
    raises = model.load_kernel("layers.0", 0, dense_kernel(0, 9, 9))
    with pytest.raises(KernelMismatchError, match=r"does not fit layer 'layers\.0', .* raised"):
        host.apply(raises.module, host.x)
    assert host.apply(model.module, host.x).shape == (3, 2)


@each_face
def test_stacked_and_scalar_layers_have_no_signature_of_their_own(face):
    if face is EQUINOX:
        stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))
        layer = stacked(jax.random.split(jax.random.key(0), 2))
        scalar = eqx.nn.Linear("scalar", 3, key=jax.random.key(0))
        host = eqx.nn.Sequential([layer, scalar])
    else:
        stacked = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs))
        layer = stacked(nnx.Rngs(0).split(2))
        host = nnx.Sequential(layer)
    model = face.wrap(host)
    assert model.signatures == {}
    with pytest.raises(KernelMismatchError, match=r"'layers\.0' is several layers, .* in a list"):
        model.load_kernel("layers.0", 0, dense_kernel(0, 3, 3))


@each_face
def test_a_layer_whose_call_kernels_cannot_join_is_refused_when_it_is_traced(face):
    """It returns no array first."""

    def call(self, x, key=None):
        return {"y": x}

    if face is EQUINOX:

        class Odd(eqx.Module):
            __call__ = call

        host = eqx.nn.Sequential([Odd()])
    else:

        class Odd(nnx.Module):
            __call__ = call

        host = nnx.Sequential(Odd())
    model = face.wrap(host, target_layers=[Odd]).load_kernel("layers.0", 0, dense_kernel(0, 3, 3))
    with pytest.raises(KernelMismatchError, match=r"layer 'layers\.0' .* return dict"):
        face.over(model.module, X)


def test_a_kernel_of_another_framework_is_a_kernel_like_any_other():
    layer = FLAX.api.kernel_from_module(FLAX.linear(3, 5))
    y = EQUINOX.over(EQUINOX.wrap().load_kernel("layers.0", 0, layer, alpha=1.0).module, X)
    assert_close(y, EQUINOX.over(EQUINOX.mlp(), X))

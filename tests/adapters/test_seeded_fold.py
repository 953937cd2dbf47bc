"""Folding an affine kernel into its host's weights changes nothing but the number of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import (
    BLENDS,
    Event,
    EventKind,
    FoldError,
    SeedLifecycleError,
    SeedLifecycleState,
    kernel_from_function,
    state_digest,
)
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    X,
    affine_kernel,
    arrays,
    at,
    dense_kernel,
    each_face,
)
from tests.adapters.hosts import equinox_images, flax_images, scaled_kernel
from tests.adapters.kernels import artifact, jax_kernel
from tests.tolerance import assert_bitwise, assert_close

S = SeedLifecycleState


def grafted(face, blend="convex", alphas=(0.5, 0.2, 0.3), host=None):
    """An affine kernel at seed 0, and two others that run beside it."""
    model = face.wrap(host, blend=blend)
    for seed, alpha in enumerate(alphas):
        kernel = affine_kernel() if seed == 0 else dense_kernel(seed)
        model = model.load_kernel("layers.0", seed, kernel, alpha=alpha)
    return model


@each_face
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("fossil", [False, True])
def test_the_output_stays_and_the_slot_is_free(face, blend, fossil):
    model = grafted(face, blend)
    model = model.fossilize("layers.0", 0) if fossil else model
    folded = model.fold("layers.0", 0)
    assert_close(face.over(folded.module, X), face.over(model.module, X))
    stage = S.FOSSILIZED if fossil else S.DORMANT
    assert S(int(folded.seeds.stage[0, 0])) is stage
    assert folded.seeds.slot[0, 0] == -1
    assert set(folded.kernels) == {1, 2}
    assert [len(runs) for _, runs in folded.plan.sites] == [2, 0]
    before, after = (face.weights(at(m.host, "layers.0")) for m in (model, folded))
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, after, strict=True))
    assert_bitwise(*(face.weights(at(m.host, "layers.1")) for m in (model, folded)))


@pytest.mark.parametrize("blend", BLENDS)
@settings(max_examples=15)
@given(alphas=st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_the_output_stays_at_any_alphas(blend, alphas):
    if blend == "convex" and (sum(alphas) > 8 or (sum(alphas) == 8 and alphas[0] == 0)):
        return
    model = grafted(EQUINOX, blend, [a / 8 for a in alphas])
    folded = model.fold("layers.0", 0)
    assert_close(EQUINOX.over(folded.module, X), EQUINOX.over(model.module, X))


@each_face
def test_alone_at_alpha_one_it_takes_the_hosts_place(face):
    folded = grafted(face, alphas=(1.0,)).fold("layers.0", 0)
    params = affine_kernel().params
    weights = face.weights(at(folded.module, "layers.0"))
    for ours, theirs in zip(weights, (params["a"], params["c"]), strict=True):
        assert_close(ours, theirs)
    assert type(at(folded.module, "layers.0")) is type(at(face.mlp(), "layers.0"))
    assert folded.plan.dormant


@each_face
def test_a_ramp_is_folded_where_it_stands(face):
    model = grafted(face, alphas=(0.0, 0.25)).ramp_seed_alpha("layers.0", 0, 0.5, 10, step=0)
    folded = model.fold("layers.0", 0, step=5)
    assert_close(face.over(folded.module, X), face.over(model.advance(5).module, X))


@each_face
def test_a_kernel_without_offset_folds_into_a_host_without_bias(face):
    low_rank = jax_kernel(0, artifact("low_rank"))
    host = face.mlp()
    host.layers[0] = face.linear(3, 5, bias=False)
    model = face.wrap(host).load_kernel("layers.0", 0, low_rank, alpha=0.5)
    folded = model.fold("layers.0", 0)
    assert_close(face.over(folded.module, X), face.over(model.module, X))
    assert face.weights(at(folded.host, "layers.0"))[1] is None
    with pytest.raises(FoldError, match="adds a constant and its host has no bias to take it"):
        face.wrap(host).load_kernel("layers.0", 0, affine_kernel()).fold("layers.0", 0)


@each_face
def test_in_bfloat16_it_holds_within_that_row_of_the_table(face):
    model = face.wrap(face.mlp(dtype=jnp.bfloat16))
    kernel = affine_kernel(dtype=jnp.bfloat16)
    model = model.load_kernel("layers.0", 0, kernel, alpha=0.5)
    folded = model.fold("layers.0", 0)
    x = X.astype(jnp.bfloat16)
    assert face.weights(at(folded.host, "layers.0"))[0].dtype == jnp.bfloat16
    assert_close(face.over(folded.module, x), face.over(model.module, x))


def sequence_mean(params, x):
    return jnp.broadcast_to(x.mean(1, keepdims=True) @ params["a"], (*x.shape[:-1], 5))


@each_face
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m.fold("layers.0", 1),
            FoldError,
            "is not affine, so it cannot be folded .* differs .* Fossilise it instead, and export",
        ),
        (
            lambda m: m.set_seed_alpha("layers.0", 2, 0.9).fold("layers.0", 0),
            FoldError,
            r"alphas of this layer sum to 1\.6, and above 1 .* lower them to a sum of at most 1",
        ),
        (
            lambda m: (
                m.set_seed_alpha("layers.0", 0, 0.0)
                .set_seed_alpha("layers.0", 1, 1.0)
                .set_seed_alpha("layers.0", 2, 0.0)
                .fold("layers.0", 0)
            ),
            FoldError,
            "a kernel at alpha 0 on a layer whose host has no weight left",
        ),
        (
            lambda m: m.fold("layers.0", 3),
            SeedLifecycleError,
            "seed 3 of layer 'layers.0' is DORMANT and cannot fold",
        ),
        (
            lambda m: m.fossilize("layers.0", 0).fold("layers.0", 0).fold("layers.0", 0),
            SeedLifecycleError,
            "seed 0 of layer 'layers.0' is FOSSILIZED and cannot fold",
        ),
    ],
    ids=["not affine", "above one", "no weight left", "dormant", "folded already"],
)
def test_what_cannot_be_folded_is_refused_and_nothing_changes(face, change, error, message):
    model = grafted(face)
    before = arrays(model.module), state_digest(model.seeds), set(model.kernels)
    with pytest.raises(error, match=message):
        change(model)
    assert_bitwise(arrays(model.module), before[0])
    assert (state_digest(model.seeds), set(model.kernels)) == before[1:]


@each_face
def test_under_sequential_only_the_first(face):
    model = face.wrap(blend="sequential").load_kernel("layers.0", 0, dense_kernel())
    model = model.load_kernel("layers.0", 1, affine_kernel())
    with pytest.raises(FoldError, match="only the first kernel in seed order can be folded"):
        model.fold("layers.0", 1)
    folded = model.unload_kernel("layers.0", 0).fold("layers.0", 1)
    assert_close(
        face.over(folded.module, X),
        face.over(model.unload_kernel("layers.0", 0).module, X),
    )


@each_face
def test_a_seed_that_stopped_is_not_folded(face):
    model = grafted(face).fossilize("layers.0", 0)
    model = model.apply_event(Event(0, 0, 0, EventKind.ERRORS, value=3.0))
    with pytest.raises(FoldError, match="seed 0 of layer 'layers.0' has stopped at its third"):
        model.fold("layers.0", 0)


@each_face
def test_layers_that_are_not_linear_are_refused(face):
    host = equinox_images() if face is EQUINOX else flax_images()
    model = face.wrap(host.module, target_layers=host.types)
    shapes = ((2, 4, 4), (3, 4, 4)) if face is EQUINOX else ((4, 4, 2), (4, 4, 3))
    model = model.load_kernel("layers.0", 0, scaled_kernel(*shapes))
    with pytest.raises(FoldError, match=r"layer 'layers\.0' is not a linear layer"):
        model.fold("layers.0", 0)


def test_a_linear_layer_that_computes_something_else_is_not_taken_for_one():
    """LoRA adds to what the weights give."""
    host = nnx.Sequential(nnx.LoRALinear(3, 5, lora_rank=2, rngs=nnx.Rngs(0)))
    model = FLAX.wrap(host).load_kernel("layers.0", 0, affine_kernel())
    with pytest.raises(FoldError, match=r"layer 'layers\.0' is not a linear layer"):
        model.fold("layers.0", 0)


@each_face
def test_kernels_of_sequences_are_not_taken_for_kernels_of_vectors(face):
    kernel = kernel_from_function(sequence_mean, {"a": affine_kernel().params["a"]}, example_rank=2)
    model = face.wrap().load_kernel("layers.0", 0, kernel)
    with pytest.raises(FoldError, match="takes examples of rank 2, and only kernels of vectors"):
        model.fold("layers.0", 0)


@each_face
def test_a_kernel_of_an_artifact_folds(face):
    model = face.wrap().load_kernel("layers.0", 0, jax_kernel(0, artifact("low_rank")), alpha=0.4)
    folded = model.fold("layers.0", 0)
    assert_close(face.over(folded.module, X), face.over(model.module, X))
    jitted = jax.jit(lambda x: face.over(folded.module, x))
    assert_close(jitted(X), face.over(model.module, X))

"""Kernels straight from a blueprint: what the artifact computes, as a function of jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.contracts import KernelSignature
from esper.errors import BlueprintError
from esper.execution import load_jax_kernel
from esper.tezzeret import (
    compile_blueprint,
    kernel_from_blueprint,
    load_blueprint,
)
from esper_functional import Kernel, check_kernel, count_params, run_contained
from tests.esper.claims import claimed
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close

SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(5,))
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


SOME = ("attention", "bottleneck", "conv_bottleneck", "gated", "low_rank", "temporal_conv")
"""One of each kind; the contract of all of them is in test_blueprint_library."""


def examples(signature: KernelSignature) -> jax.Array:
    random = np.random.default_rng(0)
    return jnp.asarray(random.normal(size=(6, *signature.input_shape)), jnp.float32)


def away_from_birth(kernel: Kernel, seed: int) -> Kernel:
    """The kernel with random parameters, for many are zero at birth."""
    random = np.random.default_rng(seed)

    def drawn(p: jax.Array) -> jax.Array:
        return jnp.asarray(random.normal(size=p.shape), p.dtype)

    return Kernel(kernel.program, jax.tree.map(drawn, kernel.params))


@pytest.mark.parametrize("name", SOME)
def test_it_is_the_artifacts_kernel_in_parameters_output_and_gradients(name):
    signature = claimed(name)[-1]
    own = kernel_from_blueprint(load_blueprint(name), signature, init_seed=3)
    compiled = load_jax_kernel(compile_blueprint(load_blueprint(name), signature, init_seed=3))
    assert_bitwise(own.params, compiled.params)
    check_kernel(own, signature.input_shape, signature.output_shape, jnp.float32, "here")
    params = away_from_birth(own, 1).params
    x = examples(signature)

    def both(kernel):
        y, pull_back = jax.vjp(kernel.program.apply, params, x)
        return y, pull_back(jnp.cos(y))

    assert_tree_close(jax.jit(lambda: both(own))(), jax.jit(lambda: both(compiled))())


@pytest.mark.parametrize("name", SOME)
def test_vmap_over_kernels_equals_the_loop(name):
    signature = claimed(name)[0]
    kernels = [
        away_from_birth(kernel_from_blueprint(load_blueprint(name), signature), i) for i in range(3)
    ]
    x = examples(signature)
    program = kernels[0].program
    assert program.mappable is program.apply
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(k.params for k in kernels))
    mapped = jax.vmap(lambda params: run_contained(program, params, x)[0])(many)
    for i, kernel in enumerate(kernels):
        assert_close(mapped[i], program.apply(kernel.params, x))


def test_a_batch_norm_that_is_mapped_sees_one_batch_at_a_time_forward_and_backward():
    signature = claimed("grouped_conv")[0]
    blueprint = load_blueprint("grouped_conv")
    own = away_from_birth(kernel_from_blueprint(blueprint, signature), 0)
    compiled = load_jax_kernel(compile_blueprint(blueprint, signature))
    xs = jnp.stack([examples(signature), examples(signature)[::-1] * 2.0])
    for program in (own.program, compiled.program):

        def loss(params, x, program=program):
            return jnp.sum(jnp.sin(run_contained(program, params, x)[0]))

        mapped = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), in_axes=(None, 0))
        values, (d_params, d_x) = mapped(own.params, xs)
        for i in range(2):
            value, (d_params_alone, d_x_alone) = jax.value_and_grad(loss, argnums=(0, 1))(
                own.params, xs[i]
            )
            assert_close(values[i], value)
            assert_tree_close(jax.tree.map(lambda d, i=i: d[i], d_params), d_params_alone)
            assert_close(d_x[i], d_x_alone)


def test_programs_are_equal_where_the_computation_is():
    gated = load_blueprint("gated")
    program = kernel_from_blueprint(gated, SIGNATURE).program
    default = gated.sizes["width"]
    assert program == kernel_from_blueprint(gated, SIGNATURE, init_seed=9).program
    assert program == kernel_from_blueprint(gated, SIGNATURE, sizes={"width": default}).program
    wider = KernelSignature(input_shape=(3,), output_shape=(6,))
    others = [
        kernel_from_blueprint(gated, SIGNATURE, sizes={"width": default + 1}),
        kernel_from_blueprint(gated, wider),
        kernel_from_blueprint(load_blueprint("bottleneck"), SIGNATURE),
    ]
    assert len({program, *(kernel.program for kernel in others)}) == 4


def test_another_seed_is_another_birth():
    first, second = (
        kernel_from_blueprint(load_blueprint("low_rank"), SIGNATURE, init_seed=seed).params
        for seed in (0, 1)
    )
    assert not np.array_equal(first["down.weight"], second["down.weight"])
    assert not np.asarray(first["up.weight"]).any()


def test_sizes_are_those_asked_for():
    kernel = kernel_from_blueprint(load_blueprint("low_rank"), SIGNATURE, sizes={"rank": 2})
    assert count_params(kernel.params) == 2 * 3 + 5 * 2


def test_over_positions_of_a_sequence_it_is_the_kernel_of_each():
    signature = KernelSignature(input_shape=(4, 3), output_shape=(4, 5))
    of_sequences = kernel_from_blueprint(load_blueprint("residual_mlp"), signature)
    of_vectors = kernel_from_blueprint(load_blueprint("residual_mlp"), SIGNATURE)
    assert of_sequences.program.example_rank == 2
    params = away_from_birth(of_vectors, 2).params
    xs = jnp.stack([X[:4], X[2:]])
    each = run_contained(of_vectors.program, params, xs)[0]
    assert_close(run_contained(of_sequences.program, params, xs)[0], each)


def test_a_higher_derivative_is_there_without_containment():
    kernel = away_from_birth(kernel_from_blueprint(load_blueprint("gated"), SIGNATURE), 0)
    hessian = jax.hessian(lambda x: jnp.sum(kernel.program.apply(kernel.params, x[None])))(X[0])
    assert hessian.shape == (3, 3)
    assert np.asarray(hessian).any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(BlueprintError, match=r"has no size rnk.*it has rank"):
        kernel_from_blueprint(load_blueprint("low_rank"), SIGNATURE, sizes={"rnk": 2})
    sequence = KernelSignature(input_shape=(4, 3), output_shape=(5,))
    with pytest.raises(BlueprintError, match=r"gives \(4, 5\), expected \(5,\)"):
        kernel_from_blueprint(load_blueprint("low_rank"), sequence)

"""Kernels: their identity, and the refusal of those that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    KasminaException,
    Kernel,
    KernelMismatchError,
    Program,
    check_kernel,
    count_params,
    kernel_from_function,
)
from tests.tolerance import assert_bitwise

WHERE = "seed 1 of layer 'hidden'"


def product(params, x):
    return x @ params["w"]


def kernel(rows: int = 3, columns: int = 5, dtype=jnp.float32) -> Kernel:
    return kernel_from_function(product, {"w": jnp.ones((rows, columns), dtype)})


def check(candidate: Kernel, dtype=jnp.float32) -> None:
    check_kernel(candidate, (3,), (5,), dtype, WHERE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_kernel_that_fits_passes(dtype):
    check(kernel(dtype=dtype), dtype)


def message(candidate: Kernel, dtype=jnp.float32) -> str:
    with pytest.raises(KernelMismatchError) as caught:
        check(candidate, dtype)
    text = str(caught.value)
    assert text.startswith(f"the kernel does not fit {WHERE}: expected input (3,) -> output (5,)")
    assert text.endswith("Choose a kernel compiled for this signature.")
    return text


def test_another_output_width_is_refused_with_both():
    text = message(kernel(columns=4))
    assert "expected input (3,) -> output (5,) of float32; its output is (4,) of float32" in text


def test_another_input_width_is_refused_with_the_reason():
    text = message(kernel(rows=2))
    assert "it refused such an input (" in text
    assert "(2,)" in text


def test_another_dtype_is_refused_with_both():
    widening = kernel_from_function(
        lambda p, x: (x @ p["w"]).astype(jnp.float32), {"w": jnp.ones((3, 5), jnp.float16)}
    )
    text = message(widening, jnp.float16)
    assert "output (5,) of float16; its output is (5,) of float32" in text


def test_mixed_dtypes_are_refused_with_the_reason():
    assert "it refused such an input (" in message(kernel(dtype=jnp.float16))


def test_another_rank_is_refused_with_both():
    taller = kernel_from_function(lambda p, x: (x @ p["w"])[..., None], kernel().params)
    assert "its output is (5, 1) of float32" in message(taller)


def test_nothing_runs_while_checking():
    def explode(params, x):
        jax.debug.callback(lambda _: pytest.fail("the kernel ran"), x)
        return product(params, x)

    check(kernel_from_function(explode, kernel().params))


def test_a_kernel_that_loses_the_batch_is_refused():
    mean = kernel_from_function(
        lambda p, x: jnp.mean(product(p, x), axis=0, keepdims=True), kernel().params
    )
    message(mean)


def test_a_kernel_that_returns_a_pair_is_refused():
    pair = kernel_from_function(lambda p, x: (product(p, x), x), kernel().params)
    message(pair)


def test_a_kernel_without_a_parameter_its_program_reads_is_refused():
    message(kernel_from_function(product, {"v": jnp.ones((3, 5))}))


def test_the_error_is_a_value_error_of_the_one_root():
    assert issubclass(KernelMismatchError, KasminaException)
    assert issubclass(KernelMismatchError, ValueError)


def test_a_program_is_its_key():
    first, other = Program("a", product), Program("a", lambda p, x: x, example_rank=2)
    assert first == other
    assert hash(first) == hash(other)
    assert first != Program("b", product)
    with pytest.raises(dataclasses.FrozenInstanceError, match="key"):
        first.key = "b"  # pyright: ignore[reportAttributeAccessIssue]


def test_kernels_of_one_function_share_a_program_and_others_do_not():
    assert kernel().program == kernel(columns=4).program
    other = kernel_from_function(lambda p, x: x @ p["w"], kernel().params)
    assert other.program != kernel().program


def test_a_kernel_is_a_pytree_of_its_parameters():
    doubled = jax.tree.map(lambda leaf: 2 * leaf, kernel())
    assert isinstance(doubled, Kernel)
    assert doubled.program == kernel().program
    assert_bitwise(doubled.params, {"w": np.full((3, 5), 2, np.float32)})
    assert_bitwise(jax.jit(lambda k: k)(kernel()), kernel())


@pytest.mark.parametrize(
    ("params", "count"),
    [({}, 0), ({"w": jnp.ones((3, 5))}, 15), ([jnp.ones(()), (jnp.ones(4), jnp.ones((0, 7)))], 5)],
)
def test_parameters_are_counted(params, count):
    assert count_params(params) == count

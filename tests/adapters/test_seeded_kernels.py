"""Kernels from functions, modules and artifacts; modules of one structure share a program."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import KernelMismatchError, kernel_from_function
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    X,
    dense_kernel,
    each_face,
    layer_weights,
    trained,
)
from tests.adapters.kernels import BLUEPRINTS, artifact, jax_kernel
from tests.functional.networks import compilations
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close


def equinox_module(seed, activation=jax.nn.relu, width=4):
    return eqx.nn.MLP(3, 5, width, 1, activation, key=jax.random.key(seed))


class FlaxModule(nnx.Module):
    def __init__(self, seed, activation=jax.nn.relu, width=4):
        rngs = nnx.Rngs(seed)
        self.up = nnx.Linear(3, width, rngs=rngs)
        self.down = nnx.Linear(width, 5, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.down(self.activation(self.up(x)))


def module(face, *args, **options):
    return (equinox_module if face is EQUINOX else FlaxModule)(*args, **options)


@each_face
def test_a_kernel_computes_what_its_module_does(face):
    own = module(face, 0)
    kernel = face.api.kernel_from_module(own)
    expected = face.over(own, X)
    assert_close(kernel.program.apply(kernel.params, X), expected)
    w, b = face.weights(face.mlp().layers[0])
    model = face.wrap().load_kernel("layers.0", 0, kernel, alpha=0.25)
    v, c = face.weights(face.mlp().layers[1])
    y = jnp.tanh(0.75 * (X @ w + b) + 0.25 * expected) @ v + c
    assert_close(face.over(model.module, X), y)


@each_face
def test_modules_of_one_structure_share_a_program_and_what_is_compiled(face):
    first, second = (face.api.kernel_from_module(module(face, seed)) for seed in (0, 1))
    assert first.program == second.program
    assert jax.tree.structure(first) == jax.tree.structure(second)
    model = face.wrap()
    one, two = (model.load_kernel("layers.0", 0, k, alpha=0.5) for k in (first, second))
    assert one.plan == two.plan
    run = jax.jit(lambda params, x: first.program.apply(params, x))
    run(first.params, X)
    step = eqx.filter_jit(face.over) if face is EQUINOX else nnx.jit(face.over)
    step(one.module, X)
    with compilations() as compiled:
        y = step(two.module, X)
        k = run(second.params, X)
    assert compiled() == 0
    assert_close(k, face.over(module(face, 1), X))
    assert_close(y, face.over(two.module, X))


@each_face
def test_modules_that_compute_something_else_do_not(face):
    kernels = [
        face.api.kernel_from_module(module(face, 0)),
        face.api.kernel_from_module(module(face, 0, jax.nn.gelu)),
        face.api.kernel_from_module(module(face, 0), example_rank=2),
    ]
    programs = {kernel.program for kernel in kernels}
    assert len(programs) == len(kernels)
    assert kernels[2].program.example_rank == 2
    wider = face.api.kernel_from_module(module(face, 0, width=6))
    plain, wide = (k.program.apply(k.params, X) for k in (kernels[0], wider))
    assert_close(wide, face.over(module(face, 0, width=6), X))
    assert (plain != kernels[1].program.apply(kernels[1].params, X)).any()


@each_face
def test_what_is_trained_is_the_kernels_own_copy(face):
    own = module(face, 0)
    y = face.over(own, X)
    kernel = face.api.kernel_from_module(own)
    doubled = jax.tree.map(lambda p: 2 * p, kernel.params)
    assert (kernel.program.apply(doubled, X) != y).any()
    assert_bitwise(face.over(own, X), y)
    assert_close(kernel.program.apply(kernel.params, X), y)


@each_face
def test_constants_of_a_module_tell_programs_apart(face):
    def make(offset):
        if face is EQUINOX:

            class Offset(eqx.Module):
                linear: eqx.nn.Linear
                shift: jax.Array

                def __call__(self, x):
                    return self.linear(x) + self.shift.astype(jnp.float32)

            kinds.append(Offset)
            return kinds[0](face.linear(3, 5), jnp.asarray(offset, jnp.int32))

        class Offset(nnx.Module):
            def __init__(self):
                self.linear, self.shift = face.linear(3, 5), offset

            def __call__(self, x):
                return self.linear(x) + self.shift

        kinds.append(Offset)
        return kinds[0]() if offset == 1 else _with_shift(kinds[0](), offset)

    kinds = []
    one, two, again = (face.api.kernel_from_module(make(offset)) for offset in (1, 2, 1))
    assert one.program != two.program
    assert one.program == again.program
    w, b = layer_weights(3, 5)
    assert_close(two.program.apply(two.params, X), X @ w + b + 2)


def _with_shift(own, offset):
    own.shift = offset
    return own


def widen(x):
    return jnp.concatenate([x, x[:, :2]], axis=1)


def chain(params, x):
    for i, w in enumerate(params["chain"]):
        x = x * (0.5 + i / 24) + w
    return widen(x)


def nested(params, x):
    return x @ params["a"]["z"] * params["a-b"] + params["a.z"]


ODD = {
    "a list of twelve": (chain, {"chain": [jnp.full(3, i / 24) for i in range(12)]}),
    "names that sort otherwise than their paths": (
        nested,
        {"a": {"z": jnp.ones((3, 5))}, "a-b": jnp.arange(5.0), "a.z": jnp.ones(5)},
    ),
    "one array": (lambda params, x: x @ params, jnp.ones((3, 5))),
    "no array": (lambda params, x: widen(x), {}),
    "integers": (
        lambda params, x: (x @ params["w"])[:, params["i"]],
        {"w": jnp.arange(15.0).reshape(3, 5), "i": jnp.asarray([4, 2, 0, 1, 3])},
    ),
}


@each_face
@pytest.mark.parametrize("name", ODD)
def test_parameters_may_be_any_tree_of_arrays(face, name):
    apply, params = ODD[name]
    kernel = kernel_from_function(apply, params)
    model = face.wrap().load_kernel("layers.0", 0, kernel, alpha=1.0)
    v, c = face.weights(face.mlp().layers[1])
    expected = jnp.tanh(apply(params, X)) @ v + c
    # Each surgery takes the parameters out and puts them in again.
    later = model.load_kernel("layers.1", 1, dense_kernel(0, 5, 2), alpha=0.0)
    later = later.with_module(later.module).fossilize("layers.1", 1)
    for own in (model, later, later.fossilize("layers.0", 0)):
        assert_close(face.over(own.module, X), expected)
        assert_bitwise(own.kernels[0].params, params)
    assert_close(face.over(face.api.export_plain(model), X), expected)
    moved = later.with_module(trained(face, later.module)).kernels[0].params
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        changed = (np.asarray(before) != np.asarray(after)).any()
        assert changed == jnp.issubdtype(before.dtype, jnp.inexact)


def test_flax_modules_with_state_of_their_own_are_refused():
    rngs = nnx.Rngs(0)
    norm = nnx.Sequential(nnx.Linear(3, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs))
    with pytest.raises(KernelMismatchError, match=r"Sequential keeps state .*layers\.1\.mean"):
        FLAX.api.kernel_from_module(norm)
    drop = nnx.Sequential(nnx.Linear(3, 5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    with pytest.raises(KernelMismatchError, match="leave out layers that do, such as BatchNorm or"):
        FLAX.api.kernel_from_module(drop)


@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_artifacts_run_and_learn_alike_in_both(blueprint):
    kernel = jax_kernel(1, artifact(blueprint))
    outputs, grads = [], []
    for face in (EQUINOX, FLAX):
        model = face.wrap(blend="residual").load_kernel("layers.0", 0, kernel, alpha=0.3)
        params, rebuild = face.split(model.module)

        def of(params, face=face, rebuild=rebuild):
            return jnp.sum(face.over(rebuild(params), X) ** 2)

        outputs.append(face.over(model.module, X))
        grads.append(face.kernels(rebuild(jax.jit(jax.grad(of))(params)).layers[0]))
    assert_close(*outputs)
    assert_tree_close(*grads)

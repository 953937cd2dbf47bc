"""What export_plain gives needs no Esper: not in its types, not to run, not to train."""

import gc
import subprocess
import sys
import textwrap
import types
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import BLENDS, KasminaException, Kernel, Program, kernel_from_function
from tests.adapters.faces import (
    EQUINOX,
    FACES,
    FLAX,
    X,
    affine_kernel,
    arrays,
    at,
    dense_kernel,
    each_face,
    gradients,
    layer_weights,
    nan_kernel,
)
from tests.adapters.hosts import HOSTS, scaled_kernel, shapes_of_examples
from tests.adapters.kernels import jax_kernel
from tests.tolerance import assert_bitwise, assert_close, assert_finite


def grafted(face, blend="convex", **options):
    model = face.wrap(blend=blend, **options)
    model = model.load_kernel("layers.0", 0, dense_kernel(), alpha=0.4)
    model = model.load_kernel("layers.0", 1, affine_kernel(), alpha=0.2)
    return model.load_kernel("layers.1", 0, affine_kernel(0, 5, 2), alpha=0.3)


def of_esper(root):
    """Objects that a model holds, however deep, of Esper's classes and functions."""
    found, seen, rest = [], {}, [root]
    while rest:
        thing = rest.pop()
        # Jax's registry of classes knows all that were ever imported.
        boundary = isinstance(thing, type | types.ModuleType)
        if id(thing) in seen or boundary or type(thing).__name__ == "PyTreeRegistry":
            continue
        seen[id(thing)] = thing
        own = thing if isinstance(thing, types.FunctionType) else type(thing)
        if own.__module__.partition(".")[0].startswith("esper"):
            found.append(thing)
        elif not (isinstance(thing, dict) and "__builtins__" in thing):
            rest += gc.get_referents(thing)
    return found


@each_face
@pytest.mark.parametrize(("blend", "isolate"), [*((b, False) for b in BLENDS), ("convex", True)])
def test_output_and_gradient_to_the_input_stay(face, blend, isolate):
    model = grafted(face, blend, isolate=isolate)
    before = arrays(model.module)
    plain = face.api.export_plain(model)
    # A plain network has no gradients that stop within it.
    value, _, to_x = gradients(face, grafted(face, blend).module)
    found, _, found_to_x = gradients(face, plain) if face is FLAX else of_plain_equinox(plain)
    assert_close(found, value)
    assert_close(found_to_x, to_x)
    assert of_esper(model.module)
    assert of_esper(plain) == []
    assert type(plain) is type(model.host)
    assert_bitwise(arrays(model.module), before)
    # The affine kernel took the place of a layer of its own.
    assert type(at(plain, "layers.1")) is type(at(model.host, "layers.1"))


def of_plain_equinox(plain):
    params, static = eqx.partition(plain, eqx.is_inexact_array)
    split = EQUINOX._replace(split=lambda _: (params, lambda p: eqx.combine(p, static)))
    return gradients(split, plain)


@each_face
def test_it_trains(face):
    plain = face.api.export_plain(grafted(face).fossilize("layers.0", 0))
    if face is FLAX:
        graph, params = nnx.split(plain)

        def rebuild(params):
            return nnx.merge(graph, params, copy=True)

    else:
        params, static = eqx.partition(plain, eqx.is_inexact_array)

        def rebuild(params):
            return eqx.combine(params, static)

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(lambda p: jnp.mean(face.over(rebuild(p), X) ** 2))(params)
        return value, grads, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)

    losses = []
    for _ in range(20):
        value, grads, params = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    # Host and kernel at the first layer, host alone at the second.
    assert len(jax.tree.leaves(grads)) == 2 + 2 + 2
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "equinox statistics"])
def test_layers_of_every_kind(name):
    host, face = HOSTS[name](), FACES[name.split()[0]]
    if face is FLAX:
        host.module.eval()
    types = tuple(t for t in host.types if t is not eqx.nn.MultiheadAttention)
    types = tuple(t for t in types if t is not nnx.MultiHeadAttention)
    model = face.wrap(host.module, target_layers=types, example=host.example)
    shapes = shapes_of_examples(name, model)
    for site in model.sites:
        model = model.load_kernel(site, 1, scaled_kernel(*shapes[site]), alpha=0.3)
    plain = face.api.export_plain(model)
    assert of_esper(plain) == []
    for x in (host.x, host.x[:1]):
        ours, theirs = (jax.jit(partial(host.apply, module)) for module in (plain, model.module))
        assert_close(ours(x), theirs(x))


def test_running_statistics_stay_what_they_are():
    host = HOSTS["flax statistics"]()
    host.module.eval()
    model = FLAX.wrap(host.module, target_layers=[nnx.BatchNorm], example=host.example)
    plain = FLAX.api.export_plain(model.load_kernel("layers.1", 0, dense_kernel(0, 5, 5)))
    _, params, statistics, rest = nnx.split(plain, nnx.Param, nnx.BatchStat, ...)
    assert len(jax.tree.leaves(statistics)) == 2
    assert len(jax.tree.leaves(params)) == 2 + 2 + 2 + 2
    assert len(jax.tree.leaves(rest)) == 2


def test_arrays_that_are_no_variables_stay_what_they_are():
    class Scaled(nnx.Module):
        def __init__(self):
            self.scale, self.w = nnx.data(jnp.arange(3.0)), nnx.Param(jnp.ones(3))

        def __call__(self, x):
            return x * self.scale * self.w[...]

    model = FLAX.wrap(nnx.Sequential(Scaled()), target_layers=[Scaled], example=(X,))
    model = model.load_kernel("layers.0", 0, dense_kernel(0, 3, 3), alpha=0.4)
    plain = FLAX.api.export_plain(model)
    assert_close(plain(X), model.module(X))
    assert len(jax.tree.leaves(nnx.state(plain, nnx.Param))) == 1 + 2


def test_a_layer_that_mixes_its_batch_keeps_the_examples_size():
    class Centre(nnx.Module):
        def __call__(self, x):
            return x - x.mean(0)

    host = nnx.Sequential(Centre())
    model = FLAX.wrap(host, target_layers=[Centre], example=(X,))
    model = model.load_kernel("layers.0", 0, dense_kernel(0, 3, 3), alpha=0.4)
    assert_close(FLAX.api.export_plain(model)(X), model.module(X))


def test_tied_parameters_stay_tied():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = FLAX.linear(3, 3)
            self.second = FLAX.linear(3, 3)
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    model = FLAX.wrap(Tied()).load_kernel("first", 0, dense_kernel(0, 3, 3), alpha=0.4)
    plain = FLAX.api.export_plain(model)
    assert_close(plain(X), model.module(X))
    assert len(jax.tree.leaves(nnx.state(plain))) == 3 + 2
    plain.second.kernel[...] = 2 * plain.second.kernel[...]
    assert any(v is plain.second.kernel for v in plain.first.layers[0].args)


@each_face
def test_kernels_of_artifacts_and_extra_leading_axes(face):
    model = face.wrap().load_kernel("layers.0", 0, jax_kernel(), alpha=0.4)
    plain = face.api.export_plain(model)
    assert of_esper(plain) == []
    assert_close(face.over(plain, X), face.over(model.module, X))
    layer, own = at(plain, "layers.0"), at(model.module, "layers.0")
    if face is FLAX:
        deep = jnp.stack([X, 2 * X])
        assert_close(layer(deep), own(deep))
    assert_close(layer(X[0]), own(X[0]))


@each_face
def test_what_incubates_is_left_out_and_what_fails_is_replaced(face):
    model = grafted(face).load_kernel("layers.0", 2, dense_kernel(5), alpha=0.0)
    incubating = model.incubate("layers.0", 2)
    plain = face.api.export_plain(incubating)
    assert_close(face.over(plain, X), face.over(incubating.module, X))
    assert len(arrays(plain)) == len(arrays(face.api.export_plain(grafted(face))))
    failing = face.wrap().load_kernel("layers.0", 2, nan_kernel(), alpha=0.3)
    y = face.over(face.api.export_plain(failing), X)
    assert_finite(y)
    assert_close(y, face.over(failing.module, X))


@each_face
def test_a_dormant_model_is_its_host(face):
    plain = face.api.export_plain(face.wrap())
    assert face.wrap().surgery.structure(plain) == face.wrap().surgery.structure(face.mlp())
    assert_bitwise(arrays(plain), arrays(face.mlp()))


@each_face
def test_in_bfloat16(face):
    model = face.wrap(face.mlp(dtype=jnp.bfloat16))
    model = model.load_kernel("layers.0", 0, dense_kernel(dtype=jnp.bfloat16), alpha=0.4)
    plain = face.api.export_plain(model)
    ours, theirs = (jax.jit(partial(face.over, module)) for module in (plain, model.module))
    x = X.astype(jnp.bfloat16)
    assert_close(ours(x), theirs(x))


@each_face
def test_a_layer_called_with_several_arrays_is_refused(face):
    name = "equinox sequence" if face is EQUINOX else "flax sequence"
    host = HOSTS[name]()
    model = face.wrap(host.module, target_layers=["attention"], example=host.example)
    model = model.load_kernel("attention", 0, scaled_kernel((4, 6), (4, 6)))
    with pytest.raises(KasminaException, match="'attention' is called with more than one array"):
        face.api.export_plain(model)


@each_face
def test_a_layer_of_unknown_shapes_is_refused(face):
    name = "equinox images" if face is EQUINOX else "flax images"
    host = HOSTS[name]()
    model = face.wrap(host.module, target_layers=host.types)
    shapes = ((2, 4, 4), (3, 4, 4)) if face is EQUINOX else ((4, 4, 2), (4, 4, 3))
    model = model.load_kernel("layers.0", 0, scaled_kernel(*shapes))
    message = r"not known what layer 'layers\.0' takes: wrap the model with `example`"
    with pytest.raises(KasminaException, match=message):
        face.api.export_plain(model)


@each_face
def test_a_linear_layer_with_a_kernel_of_sequences_needs_an_example(face):
    def mixing(params, x):
        return jnp.tanh(x - x.mean(1, keepdims=True)) @ params["w"]

    kernel = kernel_from_function(
        mixing, {"w": jnp.asarray(layer_weights(3, 5)[0])}, example_rank=2
    )
    if face is EQUINOX:
        # Here positions are mapped one by one, so none sees a sequence.
        return
    x = jnp.stack([X, 2 * X])
    model = face.wrap().load_kernel("layers.0", 0, kernel, alpha=0.4)
    with pytest.raises(KasminaException, match="wrap the model with `example`"):
        face.api.export_plain(model)
    model = face.wrap(example=(x,)).load_kernel("layers.0", 0, kernel, alpha=0.4)
    plain = face.api.export_plain(model)
    assert_close(plain(x), model.module(x))
    assert_close(plain(x[:1]), model.module(x[:1]))


def test_a_layer_that_changes_its_state_is_refused():
    host = HOSTS["flax statistics"]()
    model = FLAX.wrap(host.module, target_layers=host.types, example=host.example)
    for site, what in (("layers.1", "mean, var"), ("layers.2", "rngs.count")):
        grown = model.load_kernel(site, 0, dense_kernel(0, 5, 5))
        message = rf"layer '{site}' changes its state when it is called \({what}\), .* eval mode"
        with pytest.raises(KasminaException, match=message):
            FLAX.api.export_plain(grown)


@each_face
def test_a_kernel_that_jax_cannot_map_is_refused(face):
    program = Program("0" * 64, lambda p, x: jnp.tanh(x @ p["w"]), batches=False)
    kernel = Kernel(program, {"w": dense_kernel().params["w"]})
    model = face.wrap().load_kernel("layers.0", 0, kernel)
    with pytest.raises(
        KasminaException, match=r"of layer 'layers\.0' has no form that jax can map"
    ):
        face.api.export_plain(model)


SCRIPT = """
import sys
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
from tests.adapters.faces import FACES, X, affine_kernel, dense_kernel
from tests.adapters.kernels import jax_kernel

plain, expected = {}, {}
for name, face in FACES.items():
    model = face.wrap().load_kernel("layers.0", 0, dense_kernel(), alpha=0.4)
    model = model.load_kernel("layers.0", 1, jax_kernel(), alpha=0.3)
    model = model.load_kernel("layers.1", 2, affine_kernel(0, 5, 2), alpha=0.3)
    plain[name] = face.api.export_plain(model)
    expected[name] = np.asarray(face.over(model.module, X))

gone = [name for name in sys.modules if name.partition(".")[0].startswith(("esper", "tests"))]
assert "esper_functional" in gone
for name in gone:
    del sys.modules[name]
del face, model, FACES, affine_kernel, dense_kernel, jax_kernel

class Refuse:
    def find_spec(self, name, *rest):
        if name.partition(".")[0].startswith("esper"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
jax.clear_caches()
for name, model in plain.items():
    over = (lambda m, x: jax.vmap(m)(x)) if name == "equinox" else (lambda m, x: m(x))
    for run in (over, eqx.filter_jit(over)) if name == "equinox" else (over,):
        np.testing.assert_allclose(run(model, X), expected[name], rtol=1e-5, atol=1e-6)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(over(model, x) ** 2)))(X)
    assert np.isfinite(grad).all() and np.asarray(grad).any()
assert not [name for name in sys.modules if name.partition(".")[0].startswith("esper")]
print("ran without Esper")
"""


def test_it_runs_where_esper_cannot_be_imported(request):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        cwd=request.config.rootpath,
        env={**__import__("os").environ, "PYTHONPATH": ".:functional:adapters"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ran without Esper"

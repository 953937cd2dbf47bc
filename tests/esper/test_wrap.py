"""`esper.wrap` and its siblings: one word for three frameworks, kernels from a library by id."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import esper
from esper.errors import InputError, KernelNotFoundError
from esper_adapters.flax import carry_optimizer
from esper_functional import BlendError, KasminaException, KernelMismatchError, SeedIndexError
from tests.tolerance import assert_bitwise, assert_close

X = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)


class FlaxMLP(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def equinox_mlp():
    return eqx.nn.MLP(2, 3, 8, 1, jnp.tanh, key=jax.random.key(0))


def torch_mlp():
    return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


MAKE = {"equinox": equinox_mlp, "flax": FlaxMLP, "torch": torch_mlp}
FIRST = {"equinox": "layers.0", "flax": "layers.0", "torch": "0"}
OTHER_TYPE = {"equinox": eqx.nn.Conv2d, "flax": nnx.Conv, "torch": torch.nn.Conv2d}
JAX = ("equinox", "flax")
every = pytest.mark.parametrize("framework", MAKE)
every_jax = pytest.mark.parametrize("framework", JAX)


def over(framework, model, x=X):
    if framework == "torch":
        return model(torch.tensor(x)).detach().numpy()
    return jax.vmap(model)(x) if framework == "equinox" else model(jnp.asarray(x))


def loaded(framework, model, kernel_id, **options):
    """The model with a kernel, whichever way its framework says so."""
    if framework == "torch":
        assert model.load_kernel_sync(
            FIRST[framework], seed_idx=1, kernel_artifact_id=kernel_id, **options
        )
        return model
    return model.load_kernel(FIRST[framework], 1, kernel_id, **options)


@every
@pytest.mark.parametrize("given", ["library", "folder", "text"])
def test_kernels_are_loaded_from_a_library_by_their_id(framework, given, library, artifact):
    host = MAKE[framework]()
    where = {"library": library, "folder": library.folder, "text": str(library.folder)}[given]
    model = esper.wrap(host, library=where)
    assert next(iter(model.kasmina_layers)) == FIRST[framework]
    before = over(framework, model)
    assert_bitwise(before, over(framework, host))
    model = loaded(framework, model, artifact.kernel_id)
    stats = model.get_model_stats()
    assert stats["seeds_by_stage"]["ACTIVE"] == 1
    assert stats["kernel_parameters"] == sum(p.size for p in artifact.params.values())
    after = over(framework, model)
    if artifact.manifest.birth != "zero":
        assert (np.asarray(after) != np.asarray(before)).any()
    back = esper.unwrap(model)
    assert isinstance(back, type(host))
    assert_close(over(framework, back), before)


@every
def test_what_the_library_has_not_or_does_not_fit_is_refused(framework, library, artifact):
    model = esper.wrap(MAKE[framework](), library=library)
    if framework == "torch":
        return
    with pytest.raises(KernelNotFoundError):
        model.load_kernel("layers.0", 0, "ab" * 32)
    with pytest.raises(KernelMismatchError, match=r"seed 0 of layer 'layers\.1'"):
        model.load_kernel("layers.1", 0, artifact.kernel_id)
    with pytest.raises(KasminaException, match="pass `library=` to esper.wrap"):
        esper.wrap(MAKE[framework]()).load_kernel("layers.0", 0, artifact.kernel_id)
    assert model.get_model_stats()["seeds_by_stage"]["DORMANT"] == 8


@every
def test_options_reach_the_face(framework):
    model = esper.wrap(MAKE[framework](), seeds_per_layer=2, blend="residual", isolate=True)
    assert model.get_model_stats()["seeds"] == 4
    with pytest.raises(BlendError, match="did you mean 'convex'"):
        esper.wrap(MAKE[framework](), blend="convx")
    with pytest.raises(SeedIndexError, match="seeds_per_layer must be at least 1, got 0"):
        esper.wrap(MAKE[framework](), seeds_per_layer=0)
    with pytest.raises(SeedIndexError, match="it is made of"):
        esper.wrap(MAKE[framework](), target_layers=[OTHER_TYPE[framework]])
    if framework in JAX:
        assert (model.blend, model.isolate, model.contain) == ("residual", True, True)
        assert not esper.wrap(MAKE[framework](), contain=False).plan.contain
        chosen = esper.wrap(MAKE[framework](), target_layers=["layers.1"])
        assert chosen.sites == ("layers.1",)
    else:
        free = esper.wrap(MAKE[framework](), contain=False, cache_size_mb=3)
        assert not any(layer.contain for layer in free.kasmina_layers.values())
        assert free.seed_table.recent.size_mb == 3


@every_jax
def test_an_example_says_what_layers_take(framework):
    x = jnp.asarray(X[0] if framework == "equinox" else X)
    model = esper.wrap(MAKE[framework](), example=(x,))
    assert all(known.whole for known in model.signatures.values())


@pytest.mark.parametrize(
    ("framework", "options", "message"),
    [
        ("equinox", {"copy": True}, "`copy` is for torch models; arrays of jax never change"),
        ("flax", {"copy": True}, "`copy` is for torch models"),
        ("torch", {"example": (X,)}, "`example` is for jax models; a torch layer knows its own"),
        ("torch", {"call": lambda module, x: module(x)}, "`call` is for jax models"),
        ("flax", {"route": "native"}, "`route` and `cache_size_mb` are for torch models"),
        ("equinox", {"cache_size_mb": 3}, "`route` and `cache_size_mb` are for torch models"),
    ],
)
def test_options_of_another_framework_are_refused(framework, options, message):
    with pytest.raises(InputError, match=message):
        esper.wrap(MAKE[framework](), **options)


@pytest.mark.parametrize(
    "thing", [3, lambda x: x, {"w": X}, None], ids=["number", "function", "mapping", "nothing"]
)
def test_what_is_no_model_is_refused(thing):
    kind = type(thing).__name__
    with pytest.raises(InputError, match=rf"takes a torch\.nn\.Module, .*; got {kind}\. Linen"):
        esper.wrap(thing)
    with pytest.raises(InputError, match=f"takes what esper.wrap returned; got {kind}"):
        esper.unwrap(thing)
    with pytest.raises(InputError, match=f"takes what esper.wrap returned; got {kind}"):
        esper.export_plain(thing)


def test_a_linen_module_is_told_its_way():
    from flax import linen

    with pytest.raises(InputError, match=r"got Dense\. Linen modules .*flax\.linen_sites"):
        esper.wrap(linen.Dense(3))


@every
def test_what_is_not_wrapped_is_not_unwrapped_and_what_is_not_wrapped_again(framework):
    host = MAKE[framework]()
    with pytest.raises(KasminaException if framework == "torch" else InputError):
        esper.unwrap(host)
    with pytest.raises(KasminaException, match="wrapped already"):
        esper.wrap(esper.wrap(host))
    with pytest.raises(KasminaException if framework == "torch" else InputError):
        esper.export_plain(host)


@every_jax
def test_the_exported_model_is_plain(framework, library, artifact):
    model = loaded(framework, esper.wrap(MAKE[framework](), library=library), artifact.kernel_id)
    plain = esper.export_plain(model)
    assert isinstance(plain, type(model.host))
    assert_close(over(framework, plain), over(framework, model.module))


def test_an_exported_torch_model_is_plain(library, artifact):
    model = loaded("torch", esper.wrap(torch_mlp(), library=library), artifact.kernel_id)
    y = over("torch", model)
    plain = esper.export_plain(model)
    assert type(plain) is type(torch_mlp())
    assert_close(over("torch", plain), y)


def test_the_readmes_way_of_growing_a_flax_model(library, artifact):
    import optax

    model = esper.wrap(FlaxMLP(), blend="residual", library=library)
    optimizer = nnx.Optimizer(model.module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(module)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(module, grads)
        return value

    first = step(model.module, optimizer, X)
    grown = model.load_kernel("layers.0", 0, artifact.kernel_id)
    optimizer = carry_optimizer(optimizer, model.module, grown.module)
    for _ in range(10):
        last = step(grown.module, optimizer, X)
    assert last < first
    grown = grown.fossilize("layers.0", 0)
    assert_close(esper.export_plain(grown)(X), grown.module(X))

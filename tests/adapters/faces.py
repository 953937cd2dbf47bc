"""The two JAX faces behind one set of words, so that a law is written once for both."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_adapters import equinox as equinox_face
from esper_adapters import flax as flax_face
from esper_adapters.equinox import SeededModel
from esper_adapters.flax._layer import kernel_params
from esper_functional import Kernel, kernel_from_function

SITES = ("layers.0", "layers.1")
WIDTHS = (3, 5, 2)
X = jnp.asarray(np.random.default_rng(7).normal(size=(4, 3)), jnp.float32)


class Face(NamedTuple):
    """One framework: its hosts, and how its modules run, train and are looked into."""

    api: Any
    """The face's own module, with `wrap` and its siblings."""
    mlp: Callable[..., Any]
    """`mlp(widths, dtype)`: linear layers with tanh between, of the same weights in both."""
    linear: Callable[..., Any]
    """`linear(inputs, outputs, bias=True)`, of random weights."""
    over: Callable[[Any, Any], Any]
    """A network's output over a batch."""
    split: Callable[[Any], tuple[Any, Callable[[Any], Any]]]
    """What trains of a module, and how to put it back."""
    weights: Callable[[Any], tuple[Any, Any]]
    """Of a linear layer, grafted or not: `[in, out]`, and bias."""
    kernels: Callable[[Any], dict[int, Any]]
    """The parameters of a grafted layer's kernels, by seed."""

    def wrap(self, host: Any = None, **options: Any) -> SeededModel:
        return self.api.wrap(self.mlp() if host is None else host, **options)


def at(module: Any, path: str) -> Any:
    """The layer at a path, such as `layers.0`."""
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def layer_weights(inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([seed, inputs, outputs])
    w = random.normal(scale=inputs**-0.5, size=(inputs, outputs)).astype(np.float32)
    return w, random.normal(size=outputs).astype(np.float32)


class EquinoxMLP(eqx.Module):
    layers: list[Any]

    def __call__(self, x: Any) -> Any:
        *hidden, last = self.layers
        for layer in hidden:
            x = jnp.tanh(layer(x))
        return last(x)


class FlaxMLP(nnx.Module):
    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = nnx.List(layers)

    def __call__(self, x: Any) -> Any:
        *hidden, last = self.layers
        for layer in hidden:
            x = jnp.tanh(layer(x))
        return last(x)


def equinox_linear(inputs: int, outputs: int, bias: bool = True, dtype: Any = jnp.float32) -> Any:
    layer = eqx.nn.Linear(inputs, outputs, use_bias=bias, key=jax.random.key(0))
    w, b = layer_weights(inputs, outputs)
    layer = eqx.tree_at(lambda own: own.weight, layer, jnp.asarray(w.T, dtype))
    return eqx.tree_at(lambda own: own.bias, layer, jnp.asarray(b, dtype)) if bias else layer


def flax_linear(inputs: int, outputs: int, bias: bool = True, dtype: Any = jnp.float32) -> Any:
    layer = nnx.Linear(inputs, outputs, use_bias=bias, rngs=nnx.Rngs(0), param_dtype=dtype)
    w, b = layer_weights(inputs, outputs)
    layer.kernel[...] = jnp.asarray(w, dtype)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(b, dtype)
    return layer


def equinox_mlp(widths: Sequence[int] = WIDTHS, dtype: Any = jnp.float32) -> Any:
    pairs = itertools.pairwise(widths)
    return EquinoxMLP([equinox_linear(i, o, dtype=dtype) for i, o in pairs])


def flax_mlp(widths: Sequence[int] = WIDTHS, dtype: Any = jnp.float32) -> Any:
    pairs = itertools.pairwise(widths)
    return FlaxMLP([flax_linear(i, o, dtype=dtype) for i, o in pairs])


def equinox_split(module: Any) -> tuple[Any, Callable[[Any], Any]]:
    params, static = eqx.partition(module, equinox_face.trainable(module))
    return params, lambda params: eqx.combine(params, static)


def flax_split(module: Any) -> tuple[Any, Callable[[Any], Any]]:
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return params, lambda params: nnx.merge(graph, params, rest, copy=True)


def _value(variable: Any) -> Any:
    return None if variable is None else variable[...]


EQUINOX = Face(
    api=equinox_face,
    mlp=equinox_mlp,
    linear=equinox_linear,
    over=lambda module, x: jax.vmap(module)(x),
    split=equinox_split,
    weights=lambda layer: (layer.weight.T, layer.bias),
    kernels=lambda layer: layer.esper_kernels,
)
FLAX = Face(
    api=flax_face,
    mlp=flax_mlp,
    linear=flax_linear,
    over=lambda module, x: module(x),
    split=flax_split,
    weights=lambda layer: (_value(layer.kernel), _value(layer.bias)),
    kernels=kernel_params,
)
FACES = {"equinox": EQUINOX, "flax": FLAX}
each_face = pytest.mark.parametrize("face", list(FACES.values()), ids=list(FACES))


def loss(face: Face, module: Any, x: Any = X) -> Any:
    """A loss in which no two outputs count alike."""
    y = face.over(module, x)
    return jnp.sum(y**2 * jnp.arange(1, 1 + y.size, dtype=y.dtype).reshape(y.shape))


def gradients(face: Face, module: Any, x: Any = X) -> tuple[Any, Any, Any]:
    """The loss, its gradient as a module, and its gradient to the input."""
    params, rebuild = face.split(module)

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        return jax.value_and_grad(lambda p, x: loss(face, rebuild(p), x), argnums=(0, 1))(params, x)

    value, (to_params, to_x) = run(params, x)
    return value, rebuild(to_params), to_x


def trained(face: Face, module: Any, x: Any = X, rate: float = 0.01) -> Any:
    """A module after one step of gradient descent, as a value; the module itself stays."""
    params, rebuild = face.split(module)
    grads = jax.jit(jax.grad(lambda p: loss(face, rebuild(p), x)))(params)
    return rebuild(jax.tree.map(lambda p, g: p - jnp.asarray(rate, p.dtype) * g, params, grads))


def arrays(tree: Any) -> list[np.ndarray]:
    """Every array of a tree or NNX module, copied."""
    leaves = jax.tree.leaves(nnx.split(tree)[1] if isinstance(tree, nnx.Module) else tree)
    return [
        np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for leaf in leaves
        if eqx.is_array_like(leaf)
    ]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def affine(params: Any, x: Any) -> Any:
    return x @ params["a"] + params["c"]


def dense(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"] + params["b"])


def dense_kernel(seed: int = 0, inputs: int = 3, outputs: int = 5, dtype: Any = None) -> Kernel:
    """All share one program."""
    w, b = layer_weights(inputs, outputs, 100 + seed)
    return kernel_from_function(dense, {"w": jnp.asarray(w, dtype), "b": jnp.asarray(b, dtype)})


def affine_kernel(seed: int = 0, inputs: int = 3, outputs: int = 5, dtype: Any = None) -> Kernel:
    a, c = layer_weights(inputs, outputs, 200 + seed)
    return kernel_from_function(affine, {"a": jnp.asarray(a, dtype), "c": jnp.asarray(c, dtype)})


def nan_kernel(inputs: int = 3, outputs: int = 5) -> Kernel:
    return jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), dense_kernel(0, inputs, outputs))

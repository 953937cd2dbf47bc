"""What test_sharding runs in a process with four devices: prints what became of each case."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from esper_adapters import equinox as equinox_face
from esper_adapters import flax as flax_face
from esper_functional import count_faults, forward_batch
from tests.adapters.kernels import artifact, jax_kernel
from tests.sharded import report_cases
from tests.tolerance import assert_finite, assert_tree_close

FOUR = Mesh(jax.devices(), ("data",))
STEPS, BATCH, BAD = 3, 8, 5
KERNEL = jax_kernel(1, artifact("gated", 4, 8))
RANDOM = np.random.default_rng(0)
X, Y = (jnp.asarray(RANDOM.normal(size=(BATCH, 4)), jnp.float32) for _ in range(2))
# A gate multiplies two linear functions of it: so large an input overflows there alone.
OVERFLOWING = X.at[BAD].set(1e25)
Place = Callable[[Any], Any]


def whole(tree: Any) -> Any:
    """On every device."""
    return jax.device_put(tree, NamedSharding(FOUR, P()))


def by_rows(tree: Any) -> Any:
    """Batches over their examples, weights over their first axis."""
    return jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(FOUR, P("data") if a.ndim else P())), tree
    )


def where_it_is(tree: Any) -> Any:
    return tree


def loss_of(y: Any, target: Any) -> Any:
    return jnp.mean(jnp.tanh(y - target))


def assert_split(array: jax.Array) -> None:
    assert len(array.addressable_shards) == 4
    assert {shard.data.size * 4 for shard in array.addressable_shards} == {array.size}


def equinox_model() -> Any:
    host = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
    return equinox_face.wrap(host, seeds_per_layer=2).load_kernel("layers.0", 1, KERNEL)


@eqx.filter_jit
def equinox_step(module: Any, x: Any, y: Any) -> Any:
    def of(module: Any) -> Any:
        out = jax.vmap(module)(x)
        return loss_of(out, y), out

    (loss, out), grads = eqx.filter_value_and_grad(of, has_aux=True)(module)
    return eqx.apply_updates(module, jax.tree.map(lambda g: -0.1 * g, grads)), loss, out


def equinox_module(params: Place, data: Place) -> None:
    def train(params: Place, data: Place) -> Any:
        model = equinox_model()
        arrays, static = eqx.partition(model.module, eqx.is_array)
        # Blend weights belong to every device.
        chosen = equinox_face.trainable(model.module)
        split, rest = eqx.partition(arrays, chosen)
        module = eqx.combine(
            params(split), whole(rest) if params is not where_it_is else rest, static
        )
        seen: list[Any] = []
        for _ in range(STEPS):
            module, loss, out = equinox_step(module, data(OVERFLOWING), data(Y))
            seen.append((eqx.filter(module, eqx.is_array), loss, out))
        counted = model.with_module(module).observe(data(OVERFLOWING))
        return seen, np.asarray(counted.seeds.error_count)

    found = train(params, data)
    assert_tree_close(found, train(where_it_is, where_it_is))
    assert_finite(found[0])
    assert found[1].tolist() == [[0, 1], [0, 0]]
    if data is by_rows:
        assert_split(found[0][-1][2])
    if params is by_rows:
        assert_split(found[0][-1][0].layers[0].esper_host.weight)
        assert_split(found[0][-1][0].layers[0].esper_kernels[1]["down.weight"])


def equinox_functional() -> None:
    """The folded gradient of a deserialised program, over a batch that is spread."""
    model = equinox_model()
    flat, planned = equinox_face.to_functional(model), model.plan

    @jax.jit
    def step(params: Any, live: Any, x: Any, y: Any) -> Any:
        def of(params: Any, kernels: Any) -> Any:
            own = type(live)(live.host_weights, live.weights, live.errors, kernels, live.shadows)
            out, seen = forward_batch(flat.net, planned, params, own, x)
            return loss_of(out, y), (out, seen.faults)

        got = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(params, live.params)
        return got, count_faults(live, got[0][1][1])

    found = step(whole(flat.params), whole(model.live), by_rows(OVERFLOWING), by_rows(Y))
    assert_tree_close(found, step(flat.params, model.live, OVERFLOWING, Y))
    assert_split(found[0][0][1][0])
    assert found[1].errors.tolist() == [1]


class Host(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.hidden, self.out = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def flax_step(module: Any, x: Any, y: Any) -> Any:
    def of(module: Any) -> Any:
        out = module(x)
        return loss_of(out, y), out

    (loss, out), grads = nnx.value_and_grad(of, has_aux=True)(module)
    params = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    return loss, out


def flax_module(params: Place, data: Place) -> None:
    def train(params: Place, data: Place) -> Any:
        model = flax_face.wrap(Host(), seeds_per_layer=2).load_kernel("hidden", 1, KERNEL)
        module = model.module
        trained, rest = nnx.state(module, nnx.Param, ...)
        nnx.update(module, params(trained), whole(rest) if params is not where_it_is else rest)
        seen: list[Any] = []
        for _ in range(STEPS):
            loss, out = flax_step(module, data(OVERFLOWING), data(Y))
            seen.append((loss, out))
        counted = model.observe(data(OVERFLOWING))
        return seen, nnx.as_pure(nnx.state(module)), np.asarray(counted.seeds.error_count), module

    *found, module = train(params, data)
    *expected, _ = train(where_it_is, where_it_is)
    assert_tree_close(found, expected)
    assert_finite(found[:2])
    assert found[2].tolist() == [[0, 1], [0, 0]]
    if data is by_rows:
        assert_split(found[0][-1][1])
    if params is by_rows:
        assert_split(module.hidden.esper_host.kernel[...])
        assert_split(module.hidden.esper_kernels[1]["down.weight"][...])


CASES: dict[str, Callable[[], None]] = {
    "equinox, data parallel": lambda: equinox_module(whole, by_rows),
    "equinox, tensor parallel": lambda: equinox_module(by_rows, whole),
    "equinox, functional, data parallel": equinox_functional,
    "flax, data parallel": lambda: flax_module(whole, by_rows),
    "flax, tensor parallel": lambda: flax_module(by_rows, whole),
}


if __name__ == "__main__":
    report_cases(CASES)

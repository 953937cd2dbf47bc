"""What test_sharding runs in a process with four devices: prints what became of each case."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import esper_functional as ef
from tests.functional.lives import KERNELS, stacked, state_of
from tests.functional.networks import SITES as MLP_SITES
from tests.functional.networks import batch, host_params, mlp
from tests.sharded import report_cases
from tests.tolerance import assert_close, assert_finite, assert_tree_close

SITES = ("conv", "attention", "out")
CHANNELS, FEATURES, CLASSES, BATCH = 3, 8, 4, 8
STEPS = 4


def net(params: Any, site: Any, x: Any) -> Any:
    """Images `[batch, 3, 5, 5]` to classes `[batch, 4]`."""
    h = jax.nn.relu(site("conv", ef.conv2d, params["conv"], x, padding=1))
    h = jnp.moveaxis(h.reshape(*h.shape[:2], -1), -1, -2)
    h = h + site("attention", ef.attention, params["attention"], h, num_heads=4)
    return site("out", ef.linear, params["out"], h.mean(axis=-2))


def init_params() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "conv": ef.init_conv2d(keys[0], CHANNELS, FEATURES, 3),
        "attention": ef.init_attention(keys[1], FEATURES, 4),
        "out": ef.init_linear(keys[2], FEATURES, CLASSES),
    }


def pointwise(params: Any, x: Any) -> Any:
    """A convolution of one tap; NaN for every image whose first pixel is negative."""
    h = jnp.einsum("nchw,cd->ndhw", x, params["w"])
    return h * jnp.sqrt(x[:, :1, :1, :1])


def dense(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def grafted(*layers: int) -> tuple[ef.SeedState, dict[int, ef.Kernel]]:
    """A kernel in the second seed of each of these layers, at alpha 0.5."""
    table = {
        0: ef.kernel_from_function(pointwise, {"w": random(1, CHANNELS, FEATURES)}, example_rank=3),
        1: ef.kernel_from_function(
            dense, {"w": random(2, FEATURES, 8), "v": random(3, 8, FEATURES)}
        ),
        2: ef.kernel_from_function(
            dense, {"w": random(4, FEATURES, 8), "v": random(5, 8, CLASSES)}
        ),
    }
    kinds = ((ef.EventKind.LOAD, None), (ef.EventKind.ACTIVATE, 0.5))
    events = [
        ef.Event(0, layer, 1, kind, value=float(layer) if value is None else value)
        for layer in layers
        for kind, value in kinds
    ]
    return ef.fold_events(ef.init_seeds(len(SITES), 2), events), table


def images(bad: int | None = None) -> tuple[jax.Array, jax.Array]:
    x = np.array(random(6, BATCH, CHANNELS, 5, 5))
    x[:, 0, 0, 0] = np.abs(x[:, 0, 0, 0])
    if bad is not None:
        x[bad, 0, 0, 0] = -1.0
    return jnp.asarray(x), random(7, BATCH, CLASSES)


@partial(jax.jit, static_argnums=0)
def train_step(planned: ef.Plan, params: Any, live: Any, x: Any, y: Any) -> Any:
    """Output, loss, updated parameters of host and kernels, gradient of the input."""

    def loss_of(params: Any, kernels: Any, x: Any) -> Any:
        own = dataclasses.replace(live, params=kernels)
        out, seen = ef.forward(net, planned, params, own, x)
        return jnp.mean((out - y) ** 2), (out, seen.faults)

    take = jax.value_and_grad(loss_of, argnums=(0, 1, 2), has_aux=True)
    (loss, (out, faults)), (*grads, d_x) = take(params, live.params, x)
    params, kernels = jax.tree.map(lambda p, g: p - 0.1 * g, (params, live.params), tuple(grads))
    live = dataclasses.replace(ef.count_faults(live, faults), params=kernels)
    return out, loss, params, live, d_x, faults


def train(planned: ef.Plan, params: Any, live: Any, x: Any, y: Any) -> Any:
    """Everything that `STEPS` steps give."""
    steps: list[Any] = []
    for _ in range(STEPS):
        out, loss, params, live, d_x, faults = train_step(planned, params, live, x, y)
        steps.append((out, loss, params, live, d_x, faults))
    return steps


FOUR = Mesh(jax.devices(), ("data",))
SQUARE = Mesh(np.reshape(jax.devices(), (2, 2)), ("data", "model"))


def place(tree: Any, *axes: str | None, mesh: Mesh = FOUR) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, P(*axes)))


def assert_spread(array: jax.Array, *axes: str | None, mesh: Mesh = FOUR, parts: int = 4) -> None:
    """On four devices, in so many parts, along these axes."""
    wanted = NamedSharding(mesh, P(*axes))
    assert array.sharding.is_equivalent_to(wanted, array.ndim), array.sharding
    assert len(array.addressable_shards) == 4
    assert {shard.data.size * parts for shard in array.addressable_shards} == {array.size}


def split(params: Any, live: ef.Live, axis: str, mesh: Mesh) -> tuple[Any, ef.Live]:
    """Weights split over the features that they make, and those behind over what they take."""
    put = partial(place, mesh=mesh)

    def over(tree: Any, inner: Any = ()) -> Any:
        return {
            name: put(p, *((None, axis) if name in ("w", *inner) else (axis,)))
            for name, p in tree.items()
        }

    attention = {name: over(params["attention"][name]) for name in ("query", "key", "value")}
    out = params["attention"]["out"]
    attention["out"] = {"weight": put(out["weight"], None, axis), "bias": put(out["bias"])}
    host = {"conv": over(params["conv"]), "attention": attention, "out": over(params["out"])}
    rest = put(dataclasses.replace(live, params=()))
    return host, dataclasses.replace(rest, params=tuple(over(own) for own in live.params))


def setting(bad: int | None = None) -> Any:
    state, table = grafted(0, 1, 2)
    planned = ef.plan(state, table, SITES)
    return planned, init_params(), ef.gather(state, table, planned), *images(bad)


def assert_spread_as_before(after: Any, before: Any) -> None:
    """What was split is split in the same way; what was whole XLA may place as it likes."""
    for own, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        if not other.sharding.is_fully_replicated:
            assert own.sharding.is_equivalent_to(other.sharding, own.ndim), own.sharding


def data_parallel(bad: int | None = None) -> None:
    planned, params, live, x, y = setting(bad)
    given = (place(params), place(live), place(x, "data"), place(y, "data"))
    found = train(planned, *given)
    assert_tree_close(found, train(planned, params, live, x, y))
    for out, _, params, live, d_x, _ in found:
        assert_spread(out, "data")
        assert_spread(d_x, "data")
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((params, live)))
    program = train_step.lower(planned, *given).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program


def one_bad_example() -> None:
    data_parallel(bad=5)
    planned, params, live, x, y = setting(bad=5)
    found = train(planned, place(params), place(live), place(x, "data"), place(y, "data"))
    assert [list(np.asarray(live.errors)) for _, _, _, live, _, _ in found] == [
        [1, 0, 0], [2, 0, 0], [3, 0, 0], [3, 0, 0]
    ]  # fmt: skip
    assert_finite(found)
    healthy = train_step(planned, params, live, *images())[0]
    others = np.arange(BATCH) != 5
    assert_close(np.asarray(found[0][0])[others], np.asarray(healthy)[others])


def tensor_parallel(mesh: Mesh = FOUR, axis: str = "data", bad: int = 2) -> None:
    planned, params, live, x, y = setting(bad)
    host, own = split(params, live, axis, mesh)
    batch_axes = ("data",) if mesh is SQUARE else ()
    given = (place(x, *batch_axes, mesh=mesh), place(y, *batch_axes, mesh=mesh))
    found = train(planned, host, own, *given)
    assert_tree_close(found, train(planned, params, live, x, y))
    for out, _, after, live, _, _ in found:
        assert_spread_as_before((after, live), (host, own))
        if mesh is SQUARE:
            assert {shard.data.shape[0] for shard in out.addressable_shards} == {BATCH // 2}
    parts = 4 if mesh is FOUR else 2
    assert_spread(found[-1][2]["conv"]["weight"], axis, mesh=mesh, parts=parts)
    assert_spread(found[-1][3].params[1]["w"], None, axis, mesh=mesh, parts=parts)


def data_and_tensor_parallel() -> None:
    tensor_parallel(SQUARE, "model")


def incubation() -> None:
    """A kernel in the shadow, of a network of one example, over a batch that is spread."""
    state, table = grafted(1, 2)
    waiting = [ef.Event(1, 1, 1, ef.EventKind.ALPHA), ef.Event(1, 1, 1, ef.EventKind.INCUBATE)]
    state = ef.fold_events(state, waiting)
    planned = ef.plan(state, table, SITES)
    live: Any = ef.gather(state, table, planned)

    @jax.jit
    def gradients(params: Any, kernels: Any, x: Any, y: Any) -> Any:
        def loss_of(params: Any, kernels: Any) -> Any:
            own = dataclasses.replace(live, params=kernels)
            out, seen = ef.forward_batch(net_of_one, planned, params, own, x)
            shadows, shadowed = ef.shadow_forward_batch(net_of_one, planned, params, own, x)
            losses = [jnp.mean((each - y) ** 2) for each in (out, *shadows)]
            return sum(losses[1:], losses[0]), (out, seen.faults, shadowed.faults)

        return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(params, kernels)

    params, (x, y) = init_params(), images()
    found = gradients(place(params), place(live.params), place(x, "data"), place(y, "data"))
    assert_tree_close(found, gradients(params, live.params, x, y))
    assert_spread(found[0][1][0], "data")


def net_of_one(params: Any, site: Any, image: Any) -> Any:
    return net(params, site, image[None])[0]


@jax.jit
@jax.vmap
def dynamic_step(params: Any, state: ef.SeedState, held: ef.Bank, x: Any) -> Any:
    def loss_of(params: Any, own: Any) -> Any:
        kept = dataclasses.replace(held, params=own)
        out, faults = ef.forward_dynamic(mlp, params, state, kept, x, sites=MLP_SITES)
        return jnp.mean(out**2), faults

    (loss, faults), grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
        params, held.params
    )
    return loss, faults, ef.record_faults(state, faults, step=9), grads


def population() -> None:
    """Eight networks in stages of their own, two on each device; no device waits for another."""
    stories = ("dormant", "active", "ramping", "fossil", "loading", "active at 1", "incubating")
    states = [state_of((0, 0, story, 0), (1, 1, story, 4)) for story in stories]
    states.append(state_of((0, 1, "active", 3)))  # a kernel of NaN
    members = (
        stacked([host_params(i) for i in range(8)]),
        stacked(states),
        stacked([ef.make_bank({slot: KERNELS[slot] for slot in (0, 3, 4)})] * 8),
        stacked([batch(i) for i in range(8)]),
    )
    given = tuple(place(each, "data") for each in members)
    found = dynamic_step(*given)
    assert_tree_close(found, dynamic_step(*members))
    for leaf in jax.tree.leaves(found):
        assert_spread(leaf, "data")
    assert np.asarray(found[2].error_count)[-1, 0, 1] == 1
    assert np.asarray(found[1]).sum() == 1
    program = dynamic_step.lower(*given).compile().as_text()
    assert not re.search(r"all-reduce|all-gather|all-to-all|collective-permute", program)


def explicit_mesh() -> None:
    """`jax.make_mesh` makes axes that types tell of."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    put = partial(place, mesh=mesh)
    planned, params, live, x, y = setting(bad=5)
    with jax.set_mesh(mesh):
        found = train(planned, put(params), put(live), put(x, "data"), put(y, "data"))
    assert_tree_close(found, train(planned, params, live, x, y))
    assert_spread(found[-1][0], "data", mesh=mesh)


def explicit_mesh_mapped() -> None:
    """A network of one example under `jax.vmap`, and the dynamic mode, over a spread batch."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    put = partial(place, mesh=mesh)
    planned, params, live, x, y = setting(bad=5)
    state, table = grafted(2)
    held = ef.make_bank({2: table[2]})

    def mapped(params: Any, kernels: Any, x: Any, y: Any) -> Any:
        own = dataclasses.replace(live, params=kernels)
        out = jax.vmap(lambda x: ef.forward(net_of_one, planned, params, own, x)[0])(x)
        return jnp.mean((out - y) ** 2), out

    def dynamic(params: Any, kernels: Any, x: Any, y: Any) -> Any:
        own = dataclasses.replace(held, params=kernels)
        arrays = jax.tree.map(jnp.asarray, state)
        out, _ = ef.forward_dynamic(net, params, arrays, own, x, sites=SITES)
        return jnp.mean((out - y) ** 2), out

    for function, kernels in ((mapped, live.params), (dynamic, held.params)):
        take = jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))
        with jax.set_mesh(mesh):
            found = take(put(params), put(kernels), put(x, "data"), put(y, "data"))
        assert_tree_close(found, take(params, kernels, x, y))
        assert_spread(found[0][1], "data", mesh=mesh)


def shard_map() -> None:
    """Gradients within it need `check_vma=False`: jax cannot tell what a reverse rule sums."""
    planned, params, live, x, y = setting(bad=5)

    def gradients(params: Any, kernels: Any, x: Any, y: Any) -> Any:
        def loss_of(params: Any, kernels: Any) -> Any:
            own = dataclasses.replace(live, params=kernels)
            out, seen = ef.forward(net, planned, params, own, x)
            return jnp.sum((out - y) ** 2), seen.faults

        return jax.grad(loss_of, argnums=(0, 1), has_aux=True)(params, kernels)

    def summed(*args: Any) -> Any:
        grads, faults = gradients(*args)
        return jax.lax.psum((grads, [fault.astype(jnp.int32) for fault in faults]), "data")

    specs = (P(), P(), P("data"), P("data"))
    spread = jax.shard_map(summed, mesh=FOUR, in_specs=specs, out_specs=P(), check_vma=False)
    found, faults = jax.jit(spread)(params, live.params, x, y)
    expected, _ = jax.jit(gradients)(params, live.params, x, y)
    assert [int(fault) for fault in faults] == [1, 0, 0]
    # A device withholds the gradient of the kernel that failed on it, and no other does.
    assert_tree_close((found[0], found[1][1:]), (expected[0], expected[1][1:]))
    assert not np.asarray(expected[1][0]["w"]).any()
    assert np.asarray(found[1][0]["w"]).any()


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        data_parallel,
        one_bad_example,
        tensor_parallel,
        data_and_tensor_parallel,
        incubation,
        population,
        explicit_mesh,
        explicit_mesh_mapped,
        shard_map,
    )
}


if __name__ == "__main__":
    report_cases(CASES)

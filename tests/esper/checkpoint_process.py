"""What test_checkpoints runs in processes of its own: training, other devices, being killed."""

import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import esper_functional as ef
from esper.checkpoints import CheckpointMismatchError, load_checkpoint, save_checkpoint, tree_digest

OPTIMIZER = optax.adamw(1e-2)


def low_rank(params, x):
    return x @ params["a"] @ params["b"]


def initial_state() -> dict[str, Any]:
    """Everything that the next training step depends on."""
    keys = jax.random.split(jax.random.key(7), 4)
    mlp = eqx.filter(eqx.nn.MLP(4, 4, 8, 1, key=keys[0]), eqx.is_array)
    factors = {"a": jax.random.normal(keys[1], (4, 2)), "b": jnp.zeros((2, 4))}
    params = {"mlp": mlp, "scale": jnp.ones(4, jnp.bfloat16), "kernel": factors}
    seeds = ef.fold_events(
        ef.init_seeds(1, 2),
        [
            ef.Event(0, 0, 1, ef.EventKind.LOAD),
            ef.Event(0, 0, 1, ef.EventKind.ACTIVATE),
            ef.Event(0, 0, 1, ef.EventKind.RAMP, value=1.0, span=5),
        ],
    )
    return {
        "params": params,
        "opt_state": OPTIMIZER.init(params),
        "kernels": {0: ef.kernel_from_function(low_rank, factors)},
        "seeds": seeds,
        "key": jax.random.key(3),
        "cursor": 0,
        "average": np.float64(0.0),
        "nothing": None,
    }


@jax.jit
def _step(params, opt_state, key, alpha, x):
    key, used = jax.random.split(key)

    def loss(params):
        static = eqx.filter(eqx.nn.MLP(4, 4, 8, 1, key=used), eqx.is_array, inverse=True)
        y = jax.vmap(eqx.combine(params["mlp"], static))(x)
        y = y + alpha * low_rank(params["kernel"], x)
        kept = jax.random.bernoulli(used, 0.8, y.shape)
        y = jnp.where(kept, y * params["scale"].astype(jnp.float32), 0.0)
        return jnp.mean((y - jnp.sin(x)) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key, value


def train(state: dict[str, Any], steps: int) -> dict[str, Any]:
    """So many steps on from a state; batches follow its cursor."""
    for _ in range(steps):
        cursor = state["cursor"]
        x = np.random.default_rng(cursor).standard_normal((8, 4)).astype(np.float32)
        seeds = ef.advance(state["seeds"], cursor)
        params, opt_state, key, loss = _step(
            state["params"], state["opt_state"], state["key"], seeds.alpha[0, 1], x
        )
        kernel = state["kernels"][0]
        state = state | {
            "params": params,
            "opt_state": opt_state,
            "kernels": {0: ef.Kernel(kernel.program, params["kernel"])},
            "seeds": seeds,
            "key": key,
            "cursor": cursor + 1,
            "average": np.float64(0.9 * state["average"] + 0.1 * float(loss)),
        }
    return state


def resume(folder: Path, start: int, stop: int) -> None:
    """Train from a step to another, saving every third, and tell the digest of what results."""
    state = initial_state()
    if start:
        state, _ = load_checkpoint(folder, start, like=state)
    for step in range(start, stop, 3):
        state = train(state, 3)
        save_checkpoint(folder, step + 3, state, {})
    sys.stdout.write(tree_digest(state))


def sharded_tree(devices: int, axes: tuple[str, str]) -> dict[str, Any]:
    """Arrays that lie over a mesh by the axes' names, and some that do not."""
    shape = {4: (2, 2), 2: (1, 2), 1: (1, 1)}[devices]
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "tensor"))

    def put(array: Any, *spec: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((8, 12)).astype(np.float32)
    return {
        "matrix": put(matrix, *axes),
        "columns": put(matrix.astype(jnp.bfloat16), None, axes),
        "rows": put(rng.integers(0, 9, (8, 3), np.int32), axes[0]),
        "replicated": put(matrix[0]),
        "keys": put(jax.random.split(jax.random.key(1, impl="rbg"), 4), axes[1]),
        "empty": put(np.zeros((4, 0), np.float32), axes[0]),
        "count": jnp.asarray(3, jnp.int32),
        "host": matrix[1],
    }


def save_sharded(folder: Path) -> None:
    """Save on four devices, and tell the digest."""
    tree = sharded_tree(4, ("data", "tensor"))
    save_checkpoint(folder, 1, tree, {})
    sys.stdout.write(tree_digest(tree))


def load_sharded(folder: Path, axes: tuple[str, str]) -> None:
    """Restore on the devices of this process, and tell the digest."""
    original = sharded_tree(len(jax.devices()), axes)
    like: dict[str, Any] = {}
    for name, array in original.items():
        if name in ("columns", "keys", "empty"):  # a description places as well as an array
            like[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        else:
            like[name] = array * 0
    tree, _ = load_checkpoint(folder, 1, like)
    for name, leaf in tree.items():
        assert type(leaf) is type(original[name]), name
        if isinstance(leaf, jax.Array):
            assert leaf.sharding == original[name].sharding, name
            assert leaf.committed == original[name].committed, name
    # What is not committed goes where the others are.
    jax.jit(lambda a, n: a * n.astype(jnp.float32))(tree["matrix"], tree["count"])
    sys.stdout.write(tree_digest(tree))


def load_indivisible(folder: Path) -> None:
    """Ask for three columns on two devices, and tell how that is refused."""
    like = sharded_tree(4, ("data", "tensor"))
    rows = like["rows"]
    sharding = NamedSharding(rows.sharding.mesh, PartitionSpec(None, "data"))
    like["rows"] = jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)
    try:
        load_checkpoint(folder, 1, like)
    except CheckpointMismatchError as error:
        sys.stdout.write(str(error))


def step_tree(step: int) -> dict[str, Any]:
    """A few megabytes that follow from a step."""
    return {"w": np.random.default_rng(step).standard_normal(1 << 19), "step": step}


def save_forever(folder: Path) -> None:
    """Save step after step until killed."""
    step = 0
    while True:
        step += 1
        save_checkpoint(folder, step, step_tree(step), {})


if __name__ == "__main__":
    command, place, *rest = sys.argv[1:]
    match command:
        case "resume":
            resume(Path(place), int(rest[0]), int(rest[1]))
        case "save_sharded":
            save_sharded(Path(place))
        case "load_sharded":
            load_sharded(Path(place), (rest[0], rest[1]))
        case "load_indivisible":
            load_indivisible(Path(place))
        case "save_forever":
            save_forever(Path(place))

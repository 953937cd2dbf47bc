"""Laws of checkpoints: saved and loaded is the same, anywhere, or it is refused by name."""

import asyncio
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import esper_functional as ef
from esper import checkpoints
from esper.checkpoints import (
    MANIFEST,
    CheckpointError,
    CheckpointMismatchError,
    checkpoint_steps,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    tree_digest,
    verify_checkpoint,
)
from esper.checkpoints._names import nested
from esper.checkpoints._tree import DTYPES, named_leaves
from tests.depth import depth
from tests.esper.checkpoint_process import initial_state, step_tree, train

ROOT = Path(__file__).parents[2]


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_pytree_node_class
class Unnamed:
    """A class that gives its children no keys."""

    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten(self) -> tuple[Any, None]:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Unnamed":
        return cls(*children)


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, and leaves of the same kind, dtype, shape, placement and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if isinstance(a, jax.Array):
            assert (a.weak_type, a.committed) == (b.weak_type, b.committed)
            assert a.sharding == b.sharding
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


# Laws

_PACKED = {"bool": 1, "int2": 1, "int4": 7, "float4_e2m1fn": 15}
"""Bits that elements of these have, in a byte of which the others say nothing."""


NAMES = st.sampled_from(sorted(DTYPES))
NARROW = NAMES.filter(lambda name: not re.fullmatch("(u?int|float)64|complex128", name))
"""What jax has without 64 bits."""
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def arrays(draw: Any, names: Any = NAMES, shapes: Any = SHAPES) -> np.ndarray:
    """Any bits: NaNs with payloads, negative zeros, subnormals."""
    name = draw(names)
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    shape = draw(shapes)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8)
    array = (data & _PACKED.get(name, 255)).view(dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


def keys() -> Any:
    return st.builds(
        lambda implementation, shape: jax.random.split(
            jax.random.key(5, impl=implementation), shape
        ),
        st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]),
        st.sampled_from([(), (2,), (0,), (1, 2)]),
    )


LEAVES = (
    arrays()
    | arrays(NARROW).map(jnp.asarray)
    | st.just(1.5).map(jnp.asarray)  # weakly typed
    | keys()
    | arrays(shapes=st.just(())).map(lambda a: a[()])
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats()
    | st.complex_numbers()
    | st.none()
    | st.sampled_from([{}, (), []])
)
TEXTS = st.text(max_size=4) | st.sampled_from(["a/b", "a|b", "[0]", ".a", '"', "", "ü", "a/", ".."])


def _containers(inner: Any) -> Any:
    return (
        st.dictionaries(TEXTS, inner, max_size=3)
        | st.dictionaries(st.integers(-3, 3), inner, max_size=3)
        | st.dictionaries(st.booleans() | st.integers(2, 3) | TEXTS, inner, max_size=3).map(
            OrderedDict
        )
        | st.dictionaries(st.tuples(st.integers(0, 2), TEXTS), inner, max_size=2)
        | st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.builds(Unnamed, inner, inner)
    )


TREES = st.recursive(LEAVES, _containers, max_leaves=12).filter(lambda tree: tree is not None)
# As a whole tree, None says that there is no `like`.


@settings(max_examples=40)
@given(tree=TREES, step=st.integers(0, 10**9))
@example(tree={"w": np.ones(1), "w/": np.ones(2), "w/0": np.ones(3), "\ud800": 1}, step=0)
@example(tree=OrderedDict([(0, 1), ("0", 2), ("[0]", 3), (".0", 4)]), step=0)
def test_load_after_save_is_the_identity(tmp_path_factory, tree, step):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder, step, tree, {"meta": [1, "two", None]})
    restored, meta = load_checkpoint(folder, step, like=tree)
    assert_same(restored, tree)
    assert meta == {"meta": [1, "two", None]}
    # Names are enough to tell all leaves apart without the tree.
    named, saved = named_leaves(tree), read_manifest(folder, step)["leaves"]
    assert saved.keys() == named.keys()
    assert all(tuple(saved[n]["shape"]) == np.shape(leaf) for n, leaf in named.items())


@settings(max_examples=20)
@given(
    tree=st.recursive(
        st.dictionaries(TEXTS, arrays(), min_size=1, max_size=2),
        lambda inner: st.dictionaries(TEXTS, inner, min_size=1, max_size=2),
        max_leaves=4,
    )
)
def test_nested_dicts_come_back_without_like(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder, 3, tree, {})
    restored, _ = load_checkpoint(folder, 3)
    assert_same(restored, tree)
    assert tree_digest(restored) == tree_digest(tree)


def _nnx_state() -> Any:
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    return nnx.state(Network(nnx.Rngs(0)))


PARAMS = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}
TRAINING: dict[str, Callable[[], Any]] = {
    "equinox": lambda: eqx.filter(eqx.nn.MLP(2, 2, 4, 2, key=jax.random.key(0)), eqx.is_array),
    "nnx": _nnx_state,
    "optax adamw": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 9)).init(PARAMS),
    "optax chain": lambda: optax.MultiSteps(
        optax.chain(optax.clip(1.0), optax.masked(optax.adam(1.0), {"w": True, "b": False})), 2
    ).init(PARAMS),
    "seeds": lambda: ef.init_seeds(3, 4),
    "kernel": lambda: {7: ef.kernel_from_function(jnp.sin, PARAMS)},
    "everything": lambda: train(initial_state(), 1),
}


@pytest.mark.parametrize("name", TRAINING)
def test_what_a_training_step_needs_is_restored(tmp_path, name):
    tree = TRAINING[name]()
    save_checkpoint(tmp_path, 1, tree, {})
    assert_same(load_checkpoint(tmp_path, 1, tree)[0], tree)
    # By its description alone, as jax.eval_shape gives it, and back to the default device.
    shapes = jax.tree.map(
        lambda a: jax.eval_shape(lambda: a) if isinstance(a, jax.Array) else a, tree
    )
    assert_same(load_checkpoint(tmp_path, 1, shapes)[0], tree)


def test_an_array_goes_where_like_has_it(tmp_path):
    tree = {"a": np.arange(3, dtype=np.float32), "n": np.int32(4)}
    save_checkpoint(tmp_path, 1, tree, {})
    committed = jax.device_put(jnp.zeros(3), jax.devices()[0])
    like = {"a": committed, "n": jnp.asarray(0, jnp.int32)}
    restored, _ = load_checkpoint(tmp_path, 1, like)
    assert restored["a"].committed
    assert not restored["n"].committed
    assert load_checkpoint(tmp_path, 1)[0]["a"].flags.writeable
    assert isinstance(load_checkpoint(tmp_path, 1, tree)[0]["n"], np.int32)
    save_checkpoint(tmp_path, 2, like | {"a": committed + np.float32(1)}, {})
    assert_same(
        load_checkpoint(tmp_path, 2, tree)[0], {"a": np.ones(3, np.float32), "n": np.int32(0)}
    )


def test_64_bits_are_restored_where_the_caller_has_them(tmp_path):
    with jax.enable_x64(True):
        tree = {"a": jax.device_put(jnp.arange(3) + (1 << 40), jax.devices()[0])}
        save_checkpoint(tmp_path, 1, tree, {})
        assert_same(load_checkpoint(tmp_path, 1, tree)[0], tree)
    with pytest.raises(CheckpointMismatchError, match="a: jax has no int64 without jax_enable_x64"):
        load_checkpoint(tmp_path, 1, tree)
    assert load_checkpoint(tmp_path, 1)[0]["a"].tolist() == [1 << 40, (1 << 40) + 1, (1 << 40) + 2]


def test_what_a_donated_tree_was_can_be_like(tmp_path):
    tree = {"a": jax.device_put(jnp.ones(3), jax.devices()[0]), "key": jax.random.key(0)}
    save_checkpoint(tmp_path, 1, tree, {})
    kept = jax.tree.map(jnp.copy, tree)
    jax.tree.map(lambda leaf: leaf.delete(), tree)
    assert_same(load_checkpoint(tmp_path, 1, tree)[0], kept)


def test_inside_an_event_loop(tmp_path):
    async def notebook() -> Any:
        save_checkpoint(tmp_path, 1, step_tree(1), {})
        return load_checkpoint(tmp_path, 1)[0]

    assert_same(asyncio.run(notebook()), {"w": step_tree(1)["w"], "step": np.array(1)})
    assert asyncio.run.__module__ == "asyncio.runners"  # and not a patched one


def test_from_several_threads_and_nothing_is_logged(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    threads = [
        threading.Thread(target=save_checkpoint, args=(tmp_path / str(n), n, step_tree(n), {}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert_same(load_checkpoint(tmp_path / str(n), n, step_tree(0))[0], step_tree(n))
    # Each event loop of a thread says at DEBUG which selector it uses.
    quiet = {"jax._src.dispatch", "jax._src.compiler", "asyncio"}
    assert {record.name for record in caplog.records} <= quiet
    assert not logging.getLogger("absl").filters


# Processes of their own


def run(*arguments: object, devices: int = 1) -> str:
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        " --xla_cpu_multi_thread_eigen=false"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.esper.checkpoint_process", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole = run("resume", tmp_path, 0, 6)
    assert checkpoint_steps(tmp_path) == [3, 6]
    # It saves step 6 again, which is refused unless it is the same.
    assert run("resume", tmp_path, 3, 6) == whole


@pytest.fixture(scope="module")
def four_devices(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run("save_sharded", folder, devices=4)


@pytest.mark.parametrize(
    ("devices", "axes"),
    [
        (4, ("data", "tensor")),
        (4, ("tensor", "data")),
        (2, ("data", "tensor")),
        (1, ("data", "tensor")),
    ],
)
def test_any_devices_restore_what_four_saved(four_devices, devices, axes):
    folder, digest = four_devices
    assert run("load_sharded", folder, *axes, devices=devices) == digest


def test_a_sharding_that_does_not_divide_an_array_is_refused(four_devices):
    folder, _ = four_devices
    message = run("load_indivisible", folder, devices=4)
    assert re.search(r"\n  cannot be placed: rows: .*\nNothing was restored", message), message


def test_shards_are_written_as_they_lie(four_devices):
    folder, _ = four_devices
    (path,) = (folder / "00000001" / "arrays" / "array_metadatas").iterdir()
    written = {
        entry["array_metadata"]["param_name"]: entry["array_metadata"]["write_shape"]
        for entry in json.loads(path.read_text())["array_metadatas"]
    }
    assert written["matrix"] == [4, 6]
    assert written["columns"] == [8, 3]


def test_numpy_needs_no_devices(four_devices):
    tree, _ = load_checkpoint(four_devices[0], 1)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(tree))
    assert tree["keys"].shape == (4, 4)  # the key data of rbg


@pytest.mark.parametrize("reached", ["", "arrays"], ids=["begun", "arrays written"])
def test_kill_9_in_the_middle_of_a_save_leaves_the_earlier_ones(tmp_path, reached):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.esper.checkpoint_process", "save_forever", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    try:
        for _ in range(20_000):
            steps = checkpoint_steps(tmp_path)
            half = tmp_path / f"{len(steps) + 1:08d}"
            if len(steps) >= 2 and (half / reached).exists():
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.01)  # until it stands still
                if (half / reached).exists() and not (half / MANIFEST).exists():
                    break
                process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        else:
            pytest.fail("no save was ever seen half done")
    finally:
        process.kill()
        process.wait()
    *_, newest = checkpoint_steps(tmp_path)
    assert newest >= 2
    for step in (newest - 1, newest):
        assert_same(load_checkpoint(tmp_path, step, step_tree(0))[0], step_tree(step))
    with pytest.raises(CheckpointError, match=f"was not finished.*newest is of step {newest}"):
        load_checkpoint(tmp_path, newest + 1)
    save_checkpoint(tmp_path, newest + 1, step_tree(newest + 1), {})
    assert_same(load_checkpoint(tmp_path, newest + 1, step_tree(0))[0], step_tree(newest + 1))


# Damage

TREE = {
    "host": {"layers.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "kernels": {"3": {"up.bias": np.array([np.nan, -0.0, 1e-45], np.float32)}},
    "seeds": {"stage": np.array([[2, 0]], np.uint8), "fallback": np.array([[False, True]])},
    "moments": {"count": np.array(7, np.int32)},
}
DIGEST = "6161a5362a424b8f07825d9cb91daf8d5d9e290b32082e561d52ffe53c79cb69"


def test_the_digest_is_the_one_that_runs_have_recorded():
    assert tree_digest(TREE) == DIGEST
    assert tree_digest({**TREE, "empty": {}, "none": None}) == DIGEST
    assert tree_digest(jax.tree.map(jnp.asarray, TREE)) == DIGEST


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (np.zeros(2, ml_dtypes.bfloat16), np.zeros(2, np.float16)),
        (np.zeros(2, ml_dtypes.bfloat16), np.zeros(2, np.int16)),
        (np.zeros((0, 2)), np.zeros((2, 0))),
        (jax.random.key(0, impl="rbg"), jax.random.key(0, impl="unsafe_rbg")),
        (jax.random.key(0), jax.random.key_data(jax.random.key(0))),
        ({"a": np.zeros(1)}, [np.zeros(1)]),
        ({"0": np.zeros(1)}, [np.zeros(1)]),
        ({"a|b": np.zeros(1)}, {"a": {"b": np.zeros(1)}}),
        (np.float32(0.0), np.float32(-0.0)),
    ],
)
def test_different_trees_have_different_digests(left, right):
    assert tree_digest(left) != tree_digest(right)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "00000001").rglob("*") if p.is_file())


def test_one_flipped_bit_anywhere_is_found_and_its_file_named(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {"x": "é"})
    rng = np.random.default_rng(0)
    for path in _files(tmp_path):
        whole = path.read_bytes()
        places = {0, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()}
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(0, 8))
            path.write_bytes(damaged)
            name = "its manifest" if path.name == MANIFEST else re.escape(path.name)
            with pytest.raises(CheckpointError, match=rf"00000001 is damaged \(.*{name}.*delete"):
                load_checkpoint(tmp_path, 1, TREE)
        path.write_bytes(whole)
    load_checkpoint(tmp_path, 1)


def test_every_bit_of_the_manifest_counts(tmp_path):
    save_checkpoint(tmp_path, 1, {"w": np.ones(1)}, {"x": "é"})  # \u00e9, which is \u00E9 too
    path = tmp_path / "00000001" / MANIFEST
    whole = path.read_bytes()
    # One bit of each byte, or all.
    for bit in range(0, 8 * len(whole), depth(9, 1)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_manifest(tmp_path, 1)


def test_a_missing_file_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {})
    path = next(p for p in _files(tmp_path) if p.name != MANIFEST)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} is missing"):
        verify_checkpoint(tmp_path, 1)


def test_without_a_manifest_it_was_not_finished(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {})
    save_checkpoint(tmp_path, 2, TREE, {})
    (tmp_path / "00000002" / MANIFEST).unlink()
    assert checkpoint_steps(tmp_path) == [1]
    # Saving it again begins anew.
    save_checkpoint(tmp_path, 2, TREE, {})
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert checkpoint_steps(tmp_path / "none") == []


def test_a_full_disk_leaves_earlier_checkpoints_whole(small_disk, caplog):
    folder = small_disk(1024)
    save_checkpoint(folder, 1, TREE, {})
    large = {"host": {"w": np.random.default_rng(0).standard_normal(200_000).astype(np.float32)}}
    with pytest.raises(CheckpointError, match="step 2 could not be written.*bytes free.*are whole"):
        save_checkpoint(folder, 2, large, {})
    assert checkpoint_steps(folder) == [1]
    assert tree_digest(load_checkpoint(folder, 1)[0]) == tree_digest(TREE)
    assert not caplog.records


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written to .*file.*make room or fix"):
        save_checkpoint(tmp_path / "file" / "below", 1, TREE, {})


def _resign(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as one who knows how it is signed."""
    path = folder / "00000001" / MANIFEST
    content = json.loads(path.read_bytes())["content"]
    change(content)
    own = hashlib.sha256(json.dumps(content, sort_keys=True, indent=1).encode()).hexdigest()
    signed = {"content": content, "sha256": own}
    path.write_text(json.dumps(signed, sort_keys=True, indent=1))


def test_checkpoints_from_before_manifests_listed_leaves(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {})
    _resign(tmp_path, lambda content: content.pop("leaves"))
    assert tree_digest(load_checkpoint(tmp_path, 1)[0]) == DIGEST
    assert tree_digest(load_checkpoint(tmp_path, 1, TREE)[0]) == DIGEST
    with pytest.raises(CheckpointMismatchError, match="missing from the checkpoint: new"):
        load_checkpoint(tmp_path, 1, {**TREE, "new": np.ones(1)})


def test_a_manifest_that_lies_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {})
    name = "moments|count"
    _resign(tmp_path, lambda content: content["leaves"][name].update(type="float32"))
    with pytest.raises(CheckpointError, match=r"count is int32\[\] and not float32.*keep it"):
        load_checkpoint(tmp_path, 1)
    _resign(tmp_path, lambda content: content["leaves"][name].update(type="strange"))
    with pytest.raises(CheckpointError, match="strange"):
        load_checkpoint(tmp_path, 1)


# Refusals

LIKE = {
    "layers": [{"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32)}] * 2,
    "count": 0,
    "key": jax.random.key(0),
}


def _like(**changes: Any) -> Any:
    return {**LIKE, **changes}


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            _like(weights=np.zeros(2, np.int8)),
            r"holds 6 leaves .* which has 7:\n  missing from the checkpoint: weights int8\[2\]\n",
        ),
        (
            {**_like(), "keys": LIKE["key"], "key": None},
            (
                r"missing from the checkpoint: keys key<threefry2x32>\[\]; nearest: key\n"
                r"  not in like: key key<threefry2x32>\[\]; nearest: keys\n"
            ),
        ),
        (
            _like(layers=LIKE["layers"][:1]),
            (
                r"not in like: layers\|\[1\]\|bias float32\[3\]\n"
                r"  not in like: layers\|\[1\]\|weight float32\[2, 3\]\nNothing was restored"
            ),
        ),
        (
            _like(layers=dict(enumerate(LIKE["layers"] * 6))),
            r"layers\|\[2\]\|bias(.*\n){3}  missing from the checkpoint: 17 more\n",
        ),
        (
            _like(count=np.int64(0)),
            r"different: count: like has int64\[\], the checkpoint Python int\n",
        ),
        (_like(count=0.5), r"like has Python float, the checkpoint Python int\n"),
        (
            _like(key=jax.random.key(0, impl="rbg")),
            r"key: like has key<rbg>\[\], the checkpoint key<threefry2x32>\[\]\n",
        ),
        (
            _like(key=jax.eval_shape(lambda: jax.random.split(jax.random.key(0)))),
            r"key: like has key<threefry2x32>\[2\], the checkpoint key<threefry2x32>\[\]\n",
        ),
        (
            _like(layers=[{"weight": jnp.zeros((3, 2), jnp.bfloat16), "bias": jnp.zeros(3)}] * 2),
            (
                r"different: layers\|\[0\]\|weight: like has bfloat16\[3, 2\], the checkpoint"
                r" float32\[2, 3\]\n  different: layers\|\[1\]"
            ),
        ),
        ({}, r'read_manifest\(folder, step\)\["leaves"\] lists its leaves'),
    ],
)
def test_another_tree_is_refused_by_the_names_of_its_leaves(tmp_path, like, message):
    save_checkpoint(tmp_path, 1, LIKE, {})
    with pytest.raises(CheckpointMismatchError, match=message) as raised:
        load_checkpoint(tmp_path, 1, like)
    assert str(raised.value).startswith(f"the checkpoint {tmp_path / '00000001'} holds 6 leaves")
    assert len(str(raised.value).splitlines()) <= 14


def test_a_mismatch_is_told_before_arrays_are_read(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, LIKE, {})
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    with pytest.raises(CheckpointMismatchError):
        load_checkpoint(tmp_path, 1, {})
    reads = [name for name in opened if name.startswith(str(tmp_path))]
    # Once for its SHA-256, and no more.
    assert len(reads) == len(set(reads))


def test_a_sharding_without_devices_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, {"w": np.zeros((2, 3), np.float32)}, {})
    nowhere = NamedSharding(AbstractMesh((2,), ("data",)), PartitionSpec())
    like = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=nowhere)}
    with pytest.raises(CheckpointMismatchError, match="cannot be placed: w: .*AbstractMesh"):
        load_checkpoint(tmp_path, 1, like)


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A class that calls both its children the same."""

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("x"), 1), (jax.tree_util.GetAttrKey("x"), 2)], None

    @classmethod
    def tree_unflatten(cls, _: None, __: Any) -> "Twins":
        return cls()


def _donated() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


REFUSED: dict[str, tuple[Any, str]] = {
    "a function": (
        {"mlp": eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))},
        r"the leaf mlp\|.activation of the tree is a .*eqx.filter\(tree, eqx.is_array\)",
    ),
    "text": ({"names": ["relu"]}, r"leaf names\|\[0\] of the tree is a str 'relu'.*into `meta`"),
    "a tensor": ({"w": torch.ones(1)}, r"leaf w .* torch.Tensor.*detach\(\).cpu\(\).numpy\(\)"),
    "an object": ({"o": object()}, "leaf o of the tree is a object. A checkpoint holds arrays"),
    "text in an array": (np.array(["a"]), r"leaf \[\] of the tree has the dtype <U1.*Cast it"),
    "another byte order": ({"x": np.ones(1, ">f4")}, "x of the tree has the dtype >f4"),
    "a record": ({"x": np.zeros(1, [("a", "f4")])}, "x of the tree has the dtype .*'a'"),
    "a masked array": ({"x": np.ma.array([1])}, "leaf x of the tree is a numpy.ma.MaskedArray"),
    "a large int": ({"x": 1 << 64}, "x of the tree is the Python int 18446744073709551616.*meta"),
    "a description": ({"x": jax.ShapeDtypeStruct((0,), jnp.int8)}, "x .* holds no values"),
    "a donated array": ({"x": _donated()}, "x of the tree was deleted: it was donated"),
    "a key of a dict": (
        {"a": {np.int64(3): 1}},
        r"dict at a of the tree has the key np.int64\(3\) of type int64.*use strings or whole",
    ),
    "two of one name": (Twins(), r"two leaves of the tree have the name .x:.*flattening function"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_checkpoint_does_not_hold_is_refused_by_its_path(tmp_path, name):
    tree, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 1, tree, {})
    assert list(tmp_path.iterdir()) == []


def test_inside_a_jitted_function_there_is_nothing_to_save(tmp_path):
    with pytest.raises(CheckpointError, match="leaf x of the tree is traced.*Do this outside"):
        jax.jit(lambda x: save_checkpoint(tmp_path, 1, {"x": x}, {}))(1.0)


def test_like_must_be_arrays_too(tmp_path):
    save_checkpoint(tmp_path, 1, {"f": 1}, {})
    with pytest.raises(CheckpointError, match=r"the leaf f of the tree is a .*eqx.filter"):
        load_checkpoint(tmp_path, 1, {"f": jnp.sin})


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"a": np.ones(1)}, r"meta\['a'\] is a ndarray.*put arrays into the tree"),
        ({"a": [{"b": np.float32(1)}]}, r"meta\['a'\]\[0\]\['b'\] is a float32"),
        ({"a": {1: 2}}, r"meta\['a'\] has the key 1, and JSON has strings alone"),
    ],
)
def test_meta_must_be_json(tmp_path, meta, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 1, {}, meta)


def test_meta_comes_back_as_json_gives_it(tmp_path):
    save_checkpoint(tmp_path, 1, {}, {"a": (1, 2.5, {"é": None}), "b": True, "nan": float("nan")})
    meta = load_checkpoint(tmp_path, 1)[1]
    assert np.isnan(meta.pop("nan"))
    assert meta == {"a": [1, 2.5, {"é": None}], "b": True}


def test_a_step_is_saved_once(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {"x": float("nan")})
    before = {path: path.read_bytes() for path in _files(tmp_path)}
    save_checkpoint(tmp_path, 1, TREE, {"x": float("nan")})
    for tree, meta in [
        (TREE, {"x": 1}),
        ({**TREE, "more": 1}, {"x": float("nan")}),
        ({**TREE, "moments": {"count": np.array(8, np.int32)}}, {"x": float("nan")}),
    ]:
        with pytest.raises(CheckpointError, match="00000001 is there already.*something else"):
            save_checkpoint(tmp_path, 1, tree, meta)
    assert {path: path.read_bytes() for path in _files(tmp_path)} == before


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="00000004 is not there; .*there are none"):
        load_checkpoint(tmp_path, 4)
    save_checkpoint(tmp_path, 2, {}, {})
    with pytest.raises(CheckpointError, match="is not there; of .*, the newest is of step 2"):
        read_manifest(tmp_path, 4)
    with pytest.raises(CheckpointError, match="step is 0 or larger; got -1"):
        save_checkpoint(tmp_path, -1, {}, {})


def test_two_names_that_nested_dicts_cannot_tell_apart():
    with pytest.raises(CheckpointError, match="give `like`"):
        nested({"a": 1, ".a": 2})


def test_importing_it_does_not_import_torch_or_orbax():
    script = "import sys, esper.checkpoints; print({'torch', 'orbax', 'optax'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
    assert set(checkpoints.__all__) <= set(dir(checkpoints))

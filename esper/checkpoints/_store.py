"""Saving a tree, and restoring it where it is wanted."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import convert_element_type_p

from esper.checkpoints._manifest import (
    ARRAYS,
    MANIFEST,
    Folder,
    damaged,
    json_values,
    step_place,
    verify_checkpoint,
    write_manifest,
)
from esper.checkpoints._match import check_match
from esper.checkpoints._names import nested
from esper.checkpoints._orbax import read_arrays, read_types, write_arrays
from esper.checkpoints._tree import LeafSpec, leaf_spec, named_leaves, stored_arrays
from esper.errors import CheckpointError

_OVERHEAD = 256 << 10
"""Room for what orbax writes beside the arrays, in bytes."""


def save_checkpoint(folder: Folder, step: int, tree: Any, meta: Mapping[str, Any]) -> None:
    """Write a checkpoint of the state before `step`; visible only when it is whole.

    Saving what is there already does nothing.

    Args:
        folder: where checkpoints are kept, one folder for each step.
        tree: a pytree of jax or numpy arrays, numpy or Python numbers and keys of `jax.random`.
            Sharded arrays are written shard by shard and not gathered.
        meta: JSON values that go with it; tuples come back as lists.

    Raises:
        CheckpointError: for a leaf that is none of these, by name; where it could not be
            written, or another tree was saved at that step. Earlier ones are untouched.
    """
    place = step_place(folder, step)
    named = named_leaves(tree)
    specs = {name: leaf_spec(name, leaf) for name, leaf in named.items()}
    arrays = stored_arrays(named)
    content = {
        "step": int(step),
        "meta": json_values(meta),
        "leaves": {n: {"type": s.type, "shape": s.shape} for n, s in specs.items()},
    }
    if (place / MANIFEST).exists():
        _check_same(folder, step, content, arrays)
        return
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _check_room(place, arrays)
        write_arrays(place / ARRAYS, arrays)
        write_manifest(place, content)
    except Exception as error:  # orbax and tensorstore raise many kinds
        shutil.rmtree(place, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {place}: {reason}. The"
            " checkpoints before it are whole; make room or fix the folder first."
        ) from error


def discard_checkpoint(folder: Folder, step: int) -> None:
    """Remove a checkpoint, where there is one: first what makes it visible.

    Raises:
        OSError: where it cannot be removed.
    """
    place = step_place(folder, step)
    (place / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def _check_room(place: Path, arrays: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Refuse to begin on a disk that is too small: orbax, half done, fails noisily."""
    needed = 2 * sum(array.nbytes for array in arrays.values()) + _OVERHEAD
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"the disk has {free:,} bytes free, and it takes up to {needed:,}")


def _check_same(
    folder: Folder,
    step: int,
    content: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray | jax.Array],
) -> None:
    """Refuse to pass over a tree because another one was saved at its step."""
    specs, meta, saved = _load(folder, step, None)
    same = (
        specs == _specs(content)
        and json.dumps(meta, sort_keys=True) == json.dumps(content["meta"], sort_keys=True)
        and all(
            np.asarray(a).tobytes() == np.asarray(saved[n]).tobytes() for n, a in arrays.items()
        )
    )
    if not same:
        raise CheckpointError(
            f"the checkpoint {step_place(folder, step)} is there already, and it holds something"
            " else; save at another step or into another folder, or delete it first"
        )


def load_checkpoint(folder: Folder, step: int, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """The tree and the meta values of a checkpoint, every byte verified first.

    Args:
        folder: where checkpoints are kept.
        step: one of `checkpoint_steps(folder)`.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`s, of the structure that was saved. Its
            values are not read. Each leaf is restored to the kind of its leaf: numpy to numpy,
            numbers to numbers, a jax array to its sharding, committed or not, and a
            `ShapeDtypeStruct` to its sharding, or uncommitted on the default device where it has
            none. Devices and shardings need not be those that it was saved on.

    Returns:
        A tree of exactly like's structure. Without `like`, nested dicts of numpy arrays by name
        (an index is a whole number, an attribute a string, a key of jax.random its key data).

    Raises:
        CheckpointMismatchError: where `like` has other leaves, shapes or dtypes, by name; nothing
            was restored.
        CheckpointError: where there is no such checkpoint, naming the file that is damaged, or
            where what is whole could not be restored.
    """
    if like is None:
        specs, meta, arrays = _load(folder, step, None)
        return nested({name: np.asarray(arrays[name]) for name in specs}), meta
    targets = named_leaves(like)
    specs, meta, arrays = _load(folder, step, targets)
    leaves = [_restored(specs[name], targets[name], arrays[name]) for name in targets]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), meta


def _specs(content: Mapping[str, Any]) -> dict[str, LeafSpec]:
    return {n: LeafSpec(s["type"], tuple(s["shape"])) for n, s in content["leaves"].items()}


def _load(
    folder: Folder, step: int, targets: Mapping[str, Any] | None
) -> tuple[dict[str, LeafSpec], dict[str, Any], dict[str, np.ndarray | jax.Array]]:
    place = step_place(folder, step)
    content = verify_checkpoint(folder, step)
    try:
        if "leaves" in content:
            specs = _specs(content)
        else:  # written before manifests had them
            specs = {n: LeafSpec(*found) for n, found in read_types(place / ARRAYS).items()}
    except Exception as error:
        raise damaged(place, str(error)) from error
    if targets is not None:
        check_match(place, specs, targets)
    wanted = {
        name: _sharding(targets[name]) if targets is not None else None
        for name, spec in specs.items()
        if not spec.empty
    }
    try:
        arrays = read_arrays(place / ARRAYS, wanted)
        for name, spec in specs.items():
            dtype, shape = spec.stored
            array = arrays.setdefault(name, np.zeros(shape, dtype))
            if (array.dtype, array.shape) != (dtype, shape):
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)} and not {spec}")
    except Exception as error:  # orbax, tensorstore and the devices raise many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"the checkpoint {place} could not be restored: {reason}. Its files have their SHA-256,"
            " so keep it: see whether the devices have the memory for it, and whether this"
            " orbax-checkpoint is older than the one that saved it."
        ) from error
    return specs, content["meta"], arrays


def _sharding(target: Any) -> jax.sharding.Sharding | None:
    """Where the stored array of a leaf goes; None for the host."""
    if isinstance(target, jax.ShapeDtypeStruct):
        return target.sharding
    return target.sharding if isinstance(target, jax.Array) and target.committed else None


def _restored(spec: LeafSpec, target: Any, array: np.ndarray | jax.Array) -> Any:
    """A stored array as the kind of leaf that `target` is."""
    if isinstance(target, np.ndarray):
        return array
    if isinstance(target, np.generic):
        return np.asarray(array)[()]
    if not isinstance(target, jax.Array | jax.ShapeDtypeStruct):
        return np.asarray(array).item()
    sharding = _sharding(target)
    placed = jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)
    implementation = spec.key_implementation
    if implementation is not None:
        return jax.random.wrap_key_data(placed, impl=implementation)
    if target.weak_type:
        # Else programs would be compiled anew, and promote otherwise.
        return convert_element_type_p.bind(
            placed, new_dtype=placed.dtype, weak_type=True, sharding=None
        )
    return placed

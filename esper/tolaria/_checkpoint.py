"""Checkpoints: arrays by orbax, and a manifest of our own.

orbax restores a flipped bit without a word, so the manifest keeps the SHA-256 of
every file. It is written last: a checkpoint without one was not finished and
does not count.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from esper.errors import CheckpointError

MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_SEPARATOR = "|"
_OVERHEAD = 256 << 10
"""Room for what orbax writes beside the arrays, in bytes."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by new content, on the disk when this returns; never half of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def flatten_arrays(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested mappings as one mapping of joined names."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_arrays(value, f"{prefix}{name}{_SEPARATOR}")
        else:
            flat[prefix + name] = np.asarray(value)
    return flat


def unflatten_arrays(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `flatten_arrays`, but for mappings that were empty."""
    tree: dict[str, Any] = {}
    for joined, array in flat.items():
        *path, name = joined.split(_SEPARATOR)
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[name] = array
    return tree


def tree_digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten_arrays(tree).items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _file_digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def _checkpointer() -> Iterator[Any]:
    import orbax.checkpoint as ocp

    # orbax logs every save, and the traceback of one that failed; what a user needs to
    # know of either is said here.
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)


def save_checkpoint(
    folder: Path, step: int, tree: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Write a checkpoint of the state before `step`; visible only when it is whole.

    Args:
        folder: the run's `checkpoints`.
        meta: JSON values that go with the arrays.

    Raises:
        CheckpointError: where it could not be written; earlier ones are untouched.
    """
    place = folder / f"{step:08d}"
    if (place / MANIFEST).exists():
        return
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        flat = flatten_arrays(tree)
        _check_room(place, flat)
        with _checkpointer() as checkpointer:
            checkpointer.save((place / _ARRAYS).absolute(), flat)
        content = {"step": step, "meta": dict(meta), "files": _file_digests(place / _ARRAYS)}
        text = json.dumps(content, sort_keys=True, indent=1)
        own = hashlib.sha256(text.encode()).hexdigest()
        manifest = json.dumps({"content": content, "sha256": own}, sort_keys=True, indent=1)
        write_atomically(place / MANIFEST, manifest.encode())
    except Exception as error:  # orbax and tensorstore raise many kinds
        shutil.rmtree(place, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {place}: {reason}. The"
            " checkpoints before it are whole; make room or fix the folder, then --resume the run."
        ) from error


def _check_room(place: Path, flat: Mapping[str, np.ndarray]) -> None:
    """Refuse to begin on a disk that is too small: orbax, half done, fails noisily."""
    needed = 2 * sum(array.nbytes for array in flat.values()) + _OVERHEAD
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"the disk has {free:,} bytes free, and it takes up to {needed:,}")


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of all finished checkpoints, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(place.name)
        for place in folder.iterdir()
        if place.name.isdigit() and (place / MANIFEST).exists()
    )


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The content of a checkpoint's manifest: `step`, `meta` and `files`.

    Raises:
        CheckpointError: where it is damaged.
    """
    path = folder / f"{step:08d}" / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        content = manifest["content"]
        text = json.dumps(content, sort_keys=True, indent=1)
        if hashlib.sha256(text.encode()).hexdigest() != manifest["sha256"]:
            raise ValueError("its content does not have the SHA-256 that it states")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_damaged(path.parent, f"its manifest: {error}")) from error
    return content


def _damaged(place: Path, what: str) -> str:
    return (
        f"the checkpoint {place} is damaged ({what}). Nothing was restored; delete that folder to"
        " go on from the checkpoint before it."
    )


def verify_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """The content of a manifest, every file of the checkpoint held against it.

    Raises:
        CheckpointError: naming the file that is damaged or missing.
    """
    place = folder / f"{step:08d}"
    content = read_manifest(folder, step)
    found = _file_digests(place / _ARRAYS)
    for name, digest in content["files"].items():
        if found.get(name) != digest:
            what = "is missing" if name not in found else "does not have its SHA-256"
            raise CheckpointError(_damaged(place, f"{_ARRAYS}/{name} {what}"))
    return content


def load_checkpoint(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the meta values of a checkpoint, every byte verified first.

    Raises:
        CheckpointError: naming the file that is damaged or missing.
    """
    place = folder / f"{step:08d}"
    content = verify_checkpoint(folder, step)
    try:
        with _checkpointer() as checkpointer:
            flat = checkpointer.restore((place / _ARRAYS).absolute())
    except Exception as error:  # whatever orbax makes of it, the user's next move is the same
        raise CheckpointError(_damaged(place, str(error).splitlines()[0])) from error
    return unflatten_arrays({k: np.asarray(v) for k, v in flat.items()}), content["meta"]

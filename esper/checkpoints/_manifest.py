"""The manifest: what a checkpoint holds and the SHA-256 of each of its files.

orbax restores a flipped bit without a word, so the manifest keeps the SHA-256 of
every file. It is written last: a checkpoint without one was not finished and
does not count.
"""

import hashlib
import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper._files import sync, write_atomically
from esper.errors import CheckpointError

MANIFEST = "manifest.json"
ARRAYS = "arrays"

Folder = str | os.PathLike[str]


def step_place(folder: Folder, step: int) -> Path:
    """The folder of one checkpoint."""
    number = operator.index(step)
    if number < 0:
        raise CheckpointError(f"a checkpoint's step is 0 or larger; got {number}")
    return Path(folder) / f"{number:08d}"


def json_values(value: Any, where: str = "meta") -> Any:
    """What JSON gives back for a value: tuples become lists, everything else is kept.

    Raises:
        CheckpointError: for what JSON has no value for, with its place.
    """
    match value:
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise CheckpointError(
                        f"{where} has the key {key!r}, and JSON has strings alone; use its str()"
                    )
            return {key: json_values(inner, f"{where}[{key!r}]") for key, inner in value.items()}
        case list() | tuple():
            return [json_values(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
        case None | bool() | int() | float() | str():
            return json.loads(json.dumps(value))
        case _:
            raise CheckpointError(
                f"{where} is a {type(value).__name__}, which JSON has no value for; put arrays"
                " into the tree, and convert numbers by int() or float()"
            )


def _file_digests(folder: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[str(path.relative_to(folder))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return digests


def _text(content: Mapping[str, Any]) -> bytes:
    inner = json.dumps(content, sort_keys=True, indent=1)
    own = hashlib.sha256(inner.encode()).hexdigest()
    return json.dumps({"content": content, "sha256": own}, sort_keys=True, indent=1).encode()


def write_manifest(place: Path, content: Mapping[str, Any]) -> None:
    """Make the arrays in `place` a checkpoint: all of it is on the disk when this returns."""
    arrays = place / ARRAYS
    complete = {**content, "files": _file_digests(arrays)}
    for path in (*arrays.rglob("*"), arrays, place.parent):
        sync(path)
    write_atomically(place / MANIFEST, _text(complete))


def checkpoint_steps(folder: Folder) -> list[int]:
    """The steps of all finished checkpoints, ascending."""
    if not Path(folder).is_dir():
        return []
    return sorted(
        int(place.name)
        for place in Path(folder).iterdir()
        if place.name.isdecimal() and (place / MANIFEST).exists()
    )


def damaged(place: Path, what: str) -> CheckpointError:
    """The error of a checkpoint that is not what was saved."""
    return CheckpointError(
        f"the checkpoint {place} is damaged ({what}). Nothing was restored; delete that folder to"
        " go on from the checkpoint before it."
    )


def read_manifest(folder: Folder, step: int) -> dict[str, Any]:
    """The content of a checkpoint's manifest.

    Returns:
        `step`, `meta`, `files` (SHA-256 by path) and `leaves` (type and shape by name).

    Raises:
        CheckpointError: where there is none, or it is damaged.
    """
    place = step_place(folder, step)
    if not (place / MANIFEST).exists():
        steps = checkpoint_steps(folder)
        there = f"the newest is of step {steps[-1]}" if steps else "there are none"
        what = "was not finished" if place.exists() else "is not there"
        raise CheckpointError(
            f"the checkpoint {place} {what}; of the finished ones in {folder}, {there}"
        )
    try:
        data = (place / MANIFEST).read_bytes()
        content = json.loads(data)["content"]
        if _text(content) != data:
            raise ValueError("its content does not have the SHA-256 that it states")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(place, f"its manifest: {error}") from error
    return content


def verify_checkpoint(folder: Folder, step: int) -> dict[str, Any]:
    """The content of a manifest, every file of the checkpoint held against it.

    Raises:
        CheckpointError: naming the file that is damaged or missing.
    """
    place = step_place(folder, step)
    content = read_manifest(folder, step)
    try:
        found = _file_digests(place / ARRAYS)
    except OSError as error:
        raise damaged(place, f"{error.filename}: {error.strerror}") from error
    for name, digest in content["files"].items():
        if found.get(name) != digest:
            what = "is missing" if name not in found else "does not have its SHA-256"
            raise damaged(place, f"{ARRAYS}/{name} {what}")
    return content

"""What a learner knows as one file: its arrays as safetensors, and beside them what they mean."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from esper._files import write_atomically
from esper.errors import InputError
from esper.tamiyo.learning._experienced import Shape, blank_transition
from esper.tamiyo.learning._online_bucket import Bucket
from esper.tamiyo.learning._online_settings import OnlineSettings
from esper.tamiyo.learning._online_update import OnlineState
from esper.tamiyo.service import LearningCounts

SCHEMA_VERSION = 1
_KIND = "esper-online-learning"


class Known(NamedTuple):
    """All that the next update depends on."""

    first: str
    """A digest of the policy that it began with."""
    layers: str
    state: OnlineState
    buckets: dict[Shape, Bucket]
    counts: LearningCounts


class Packed(NamedTuple):
    """The same as a file holds it; copies."""

    about: dict[str, Any]
    """JSON values."""
    arrays: dict[str, np.ndarray]


def packed(known: Known) -> Packed:
    """What a file of it holds."""
    leaves = jax.tree_util.tree_leaves_with_path(known.state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    buckets: list[dict[str, Any]] = []
    for row, (shape, bucket) in enumerate(known.buckets.items()):
        kept = bucket.store.state()
        columns = {_column(row, at): own for at, own in enumerate(kept.pop("columns"))}
        arrays |= columns
        arrays |= {_of(row, name): kept.pop(name) for name in ("priorities", "generator")}
        own = {"shape": shape, "columns": len(columns), "taken": bucket.taken}
        buckets.append(own | {"updates": bucket.updates} | kept)
    about = {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "first": known.first,
        "layers": known.layers,
        "counts": dataclasses.asdict(known.counts),
        "buckets": buckets,
    }
    return Packed(about, arrays)


def write_online(path: Path, everything: Packed) -> None:
    """Write it, whole or not at all."""
    arrays = {name: np.asarray(own, order="C") for name, own in everything.arrays.items()}
    write_atomically(path, save(arrays, {"esper": json.dumps(everything.about)}))


def read_online(path: Path, first: str, like: OnlineState, settings: OnlineSettings) -> Known:
    """Read what `write_online` wrote.

    Args:
        path: of the file.
        first: the digest of the policy that the learner begins with.
        like: a state of that policy.
        settings: of the learner that goes on.

    Raises:
        InputError: where there is no such file, it is damaged or something else, was written by a
            newer Esper, or is of another policy or of other layers.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("esper", "{}"))
            _check(path, about, first, settings)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        buckets = {
            tuple(own["shape"]): _bucket(row, own, arrays, settings)
            for row, own in enumerate(about["buckets"])
        }
        counts = LearningCounts(**about["counts"])
        return Known(about["first"], about["layers"], _filled(like, arrays), buckets, counts)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {path}: expected a file that a learner of `esper tamiyo serve` wrote"
        ) from error
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} is damaged, or holds nothing learned ({error}): put a copy in its place, or"
            " begin in another folder"
        ) from error


def _check(path: Path, about: Mapping[str, Any], first: str, settings: OnlineSettings) -> None:
    if about.get("kind") != _KIND:
        raise InputError(
            f"{path} holds nothing learned: expected a file that a learner of `esper tamiyo serve`"
            " wrote"
        )
    if about["schema_version"] > SCHEMA_VERSION:
        raise InputError(
            f"{path} was written by a newer Esper, schema {about['schema_version']}; this one reads"
            f" up to {SCHEMA_VERSION}: update Esper, or begin in another folder"
        )
    if about["first"] != first:
        raise InputError(
            f"{path} holds what another policy has learned: go on with the policy that it was"
            " begun with, or begin in another folder"
        )
    if about["layers"] != settings.layers:
        raise InputError(
            f"{path} was learned with layers {about['layers']!r}, and asked for is"
            f" {settings.layers!r}: go on with the same, or begin in another folder"
        )


def _bucket(
    row: int, own: Mapping[str, Any], arrays: Mapping[str, np.ndarray], settings: OnlineSettings
) -> Bucket:
    columns = [arrays[_column(row, at)] for at in range(own["columns"])]
    # As many as it had room for, whatever the settings are now.
    bucket = Bucket(blank_transition(columns), settings, row, len(columns[0]))
    named = {name: arrays[_of(row, name)] for name in ("priorities", "generator")}
    numbers = {name: own[name] for name in ("added", "largest")}
    bucket.store.restore({"columns": columns} | named | numbers)
    bucket.taken, bucket.updates = own["taken"], own["updates"]
    return bucket


def _filled(like: OnlineState, arrays: Mapping[str, np.ndarray]) -> OnlineState:
    def filled(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        found = arrays[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise TypeError(
                f"{name} is {found.dtype}{list(found.shape)}, and expected is"
                f" {leaf.dtype}{list(leaf.shape)}"
            )
        return jnp.asarray(found)

    return jax.tree_util.tree_map_with_path(filled, like)


def _column(row: int, at: int) -> str:
    return _of(row, f"column {at}")


def _of(row: int, name: str) -> str:
    return f"bucket {row} {name}"

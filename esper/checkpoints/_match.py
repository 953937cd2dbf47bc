"""Whether a checkpoint fits the tree that it is to be restored into."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esper.checkpoints._tree import LeafSpec, leaf_spec
from esper.errors import CheckpointError

_LINES = 3
"""Lines for each kind of disagreement."""
_CANDIDATES = 500
"""Names that are searched for the nearest one."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint holds another tree than the one that was asked for; it is not damaged."""


def check_match(place: Path, found: Mapping[str, LeafSpec], like: Mapping[str, Any]) -> None:
    """Refuse a tree that is not the one that was saved, before anything is restored.

    Args:
        place: the checkpoint's folder, for the message.
        found: what it holds.
        like: the leaves that are asked for, by name.

    Raises:
        CheckpointMismatchError: naming the leaves that are missing, unexpected or different, and
            those that cannot be placed as `like` asks.
        CheckpointError: where `like` has a leaf that no checkpoint holds.
    """
    wanted = {name: leaf_spec(name, leaf) for name, leaf in like.items()}
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    differing = [name for name in wanted if name in found and wanted[name] != found[name]]
    agreeing = [name for name in wanted if name in found and wanted[name] == found[name]]
    unplaceable = {
        name: reason for name in agreeing if (reason := _unplaceable(wanted[name], like[name]))
    }
    if not (missing or unexpected or differing or unplaceable):
        return
    lines = [
        *_bounded(
            "different",
            (f"{n}: like has {wanted[n]}, the checkpoint {found[n]}" for n in differing[:_LINES]),
            len(differing),
        ),
        *_bounded(
            "missing from the checkpoint",
            (f"{n} {wanted[n]}{_nearest(n, unexpected)}" for n in missing[:_LINES]),
            len(missing),
        ),
        *_bounded(
            "not in like",
            (f"{n} {found[n]}{_nearest(n, missing)}" for n in unexpected[:_LINES]),
            len(unexpected),
        ),
        *_bounded(
            "cannot be placed",
            (f"{name}: {unplaceable[name]}" for name in list(unplaceable)[:_LINES]),
            len(unplaceable),
        ),
    ]
    raise CheckpointMismatchError(
        f"the checkpoint {place} holds {len(found)} leaves and does not fit `like`, which has"
        f" {len(wanted)}:\n" + "\n".join(lines) + "\nNothing was restored. Build `like` as the tree"
        ' was built that was saved (read_manifest(folder, step)["leaves"] lists its leaves), or'
        " load without `like` and move the arrays over by name."
    )


def _bounded(what: str, lines: Iterable[str], count: int) -> list[str]:
    shown = [f"  {what}: {line}" for line in lines]
    return [*shown, f"  {what}: {count - len(shown)} more"] if count > len(shown) else shown


def _nearest(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others[:_CANDIDATES], n=1, cutoff=0.5)
    return f"; nearest: {near[0]}" if near else ""


def _unplaceable(spec: LeafSpec, leaf: Any) -> str:
    """Why a leaf of this kind cannot lie where `like` has it; "" where it can."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return ""
    dtype, shape = spec.stored
    if np.dtype(jax.dtypes.canonicalize_dtype(dtype)) != dtype:
        return f"jax has no {dtype.name} without jax_enable_x64; enable it or give a numpy array"
    sharding = leaf.sharding
    if sharding is None:
        return ""
    try:
        sharding.shard_shape(shape)
        addressable = sharding.is_fully_addressable
    except ValueError as error:  # not divisible, or over a mesh without devices
        return str(error).splitlines()[0]
    return "" if addressable else "its sharding has devices of other processes"

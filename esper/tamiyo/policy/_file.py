"""A trained policy as one file: its arrays as safetensors, and beside them what they mean.

Nothing is unpickled. The file names all features that the policy takes, in their order, so that one
that was trained to see other things is refused and not misread.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from esper._files import write_atomically
from esper.contracts import explained
from esper.errors import InputError
from esper.tamiyo.graph import KERNEL_FEATURES, NODE_FEATURES, RUN_FEATURES, SEED_FEATURES
from esper.tamiyo.policy._effects import make_effects
from esper.tamiyo.policy._familiar import SUMMARY, Familiar
from esper.tamiyo.policy._loaded import LoadedPolicy
from esper.tamiyo.policy._policy import make_policy

SCHEMA_VERSION = 1
_KIND = "esper-policy"
SHIPPED = "shipped.safetensors"

_FEATURES = {
    "run": RUN_FEATURES,
    "node": NODE_FEATURES,
    "seed": SEED_FEATURES,
    "kernel": KERNEL_FEATURES,
}


def save_policy(path: Path, loaded: LoadedPolicy) -> None:
    """Write a policy to a file, whole or not at all."""
    about = {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "features": {name: list(own) for name, own in _FEATURES.items()},
        "policy": {
            "width": loaded.policy.width,
            "rounds": len(loaded.policy.passing.rounds),
            "heads": _heads(loaded),
        },
        "effects": {
            "method": loaded.effects.method,
            "members": len(loaded.effects.members.last.weight),
        },
        "max_epistemic": loaded.max_epistemic,
        "min_confidence": loaded.min_confidence,
        "card": loaded.card,
    }  # fmt: skip
    write_atomically(path, save(_arrays(_tree(loaded)), {"esper": json.dumps(about)}))


def _heads(loaded: LoadedPolicy) -> int:
    rounds = loaded.policy.passing.rounds
    return len(rounds[0].of_sender) if rounds else 1


def _tree(loaded: LoadedPolicy) -> Any:
    return loaded.policy, loaded.effects, loaded.familiar


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def load_policy(path: Path | None = None) -> LoadedPolicy:
    """Read a policy from a file; without one, that which comes with Esper.

    Raises:
        InputError: where there is no such file, it is damaged or none of Esper's policies, was
            written by a newer Esper, or is of a policy that sees other features.
    """
    if path is None:
        path = Path(str(files("esper.tamiyo.policy").joinpath(SHIPPED)))
    try:
        with safe_open(path, framework="numpy") as file:
            about = _about(path, json.loads((file.metadata() or {}).get("esper", "{}")))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(
            f"there is no policy {path}: expected a file that `esper tamiyo train` wrote"
        ) from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"the policy {path} is damaged or no policy: {error}") from error
    try:
        blank = _blank(about.policy.model_dump(), about.effects.model_dump())
    except (InputError, ValueError) as error:
        raise InputError(f"the policy {path} is damaged: {error}") from error
    filled = _filled(path, blank, arrays)
    return LoadedPolicy(
        policy=filled[0],
        effects=filled[1],
        familiar=filled[2],
        max_epistemic=about.max_epistemic,
        min_confidence=about.min_confidence,
        card=about.card,
    )


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Network(_Strict):
    width: int = Field(ge=1)
    rounds: int = Field(ge=0)
    heads: int = Field(ge=1)


class _Estimates(_Strict):
    method: Literal["ensemble", "dropout"]
    members: int = Field(ge=1)


class _About(_Strict):
    """What a file says of itself, of this schema."""

    features: dict[str, list[str]]
    policy: _Network
    effects: _Estimates
    max_epistemic: float = Field(ge=0.0)
    min_confidence: float = Field(ge=0.0, le=1.0)
    card: dict[str, Any]


def _about(path: Path, about: Any) -> _About:
    if not isinstance(about, dict) or about.get("kind") != _KIND:
        raise InputError(
            f"{path} is no policy of Esper's: expected a file that `esper tamiyo train` wrote"
        )
    version = about.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise InputError(
            f"the policy {path} is damaged: its schema_version is {version!r}, and expected is a"
            " whole number from 1"
        )
    if version > SCHEMA_VERSION:
        raise InputError(
            f"the policy {path} was written by a newer Esper, schema {version}; this one reads"
            f" up to {SCHEMA_VERSION}: update Esper, or train one with this"
        )
    try:
        read = _About.model_validate(about)
    except ValidationError as error:
        raise InputError(f"the policy {path} is damaged: {explained(error)}") from error
    for name, own in _FEATURES.items():
        found = read.features.get(name, [])
        if found != list(own):
            differ = sorted(set(found) ^ set(own)) or ["their order"]
            raise InputError(
                f"the policy {path} sees other {name} features than this Esper measures"
                f" ({', '.join(differ)}): train one with this Esper"
            )
    return read


def _blank(policy: Mapping[str, Any], effects: Mapping[str, Any]) -> Any:
    """What a file holds, as shapes: nothing is drawn and nothing compiled."""

    def made(key: jax.Array) -> Any:
        network = make_policy(key, **policy)
        number = jnp.zeros(())
        numbers = jnp.zeros(len(SUMMARY))
        familiar = Familiar(numbers, numbers, number)
        return network, make_effects(key, network.width, **effects), familiar

    return eqx.filter_eval_shape(made, jax.random.key(0))


def _filled(path: Path, blank: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    dynamic, static = eqx.partition(blank, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    leaves, structure = jax.tree_util.tree_flatten_with_path(dynamic)
    names = [jax.tree_util.keystr(place) for place, _ in leaves]
    if set(names) != set(arrays):
        raise InputError(
            f"the policy {path} is damaged: it lacks or has too many of its arrays, such as"
            f" {sorted(set(names) ^ set(arrays))[0]}"
        )
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if arrays[name].shape != leaf.shape:
            raise InputError(
                f"the policy {path} is damaged: {name} has the shape {arrays[name].shape}, and"
                f" expected is {tuple(leaf.shape)}"
            )
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"the policy {path} is damaged: {name} holds what is no finite number")
    own = jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in names])
    return eqx.combine(own, static)

"""A jax trainee at one moment: kept in memory, or as the arrays of a checkpoint."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper.artifacts import Artifact
from esper.errors import InputError
from esper.execution import load_jax_kernel
from esper.tezzeret import artifact_cost
from esper.tolaria._jax_programs import Group, Static, as_jax, new_group
from esper.tolaria._trainee import (
    ArrayTree,
    Optimisation,
    Params,
    state_tree,
    tree_state,
)
from esper_adapters.equinox import SeededModel
from esper_functional import (
    Kernel,
    Live,
    Plan,
    SeedLifecycleState,
    SeedState,
    gather,
    reweigh,
    running_seeds,
)


class Arranged(NamedTuple):
    """What a plan needs, picked from the model: the running kernels by role."""

    plan: Plan
    running: tuple[int, ...]
    """Slots of the kernels, in plan order."""
    active: tuple[int, ...]
    """Of those that train."""
    trained: tuple[Group, ...]
    fossils: tuple[Any, ...]
    live: Live | None
    """Weights and failure counts; the parameters are in `trained` and `fossils`."""


class Held(NamedTuple):
    """All that a trainee is; its arrays are never written to."""

    host: Group
    rest: Any
    model: SeededModel
    groups: Mapping[int, Group]
    flops: Mapping[int, int]
    now: Arranged


def arrange(
    model: SeededModel, groups: Mapping[int, Group], counts: Mapping[int, int] | None = None
) -> Arranged:
    """Pick what a plan needs.

    Args:
        counts: failures that are not in the seeds yet, by slot.
    """
    plan, seeds = model.plan, model.seeds
    slots = tuple(int(seeds.slot[place]) for place in running_seeds(seeds))
    active = tuple(s for s, run in zip(slots, plan.runs, strict=True) if not run.frozen)
    frozen = tuple(s for s, run in zip(slots, plan.runs, strict=True) if run.frozen)
    live = gather(seeds, model.kernels, plan)
    if live is not None:
        own = zip(slots, live.errors, strict=True)
        errors = [(counts or {}).get(slot, int(count)) for slot, count in own]
        live = Live(
            host_weights=live.host_weights, weights=live.weights, shadows=live.shadows,
            errors=np.array(errors, np.int32), params=(),
        )  # fmt: skip
    return Arranged(
        plan,
        slots,
        active,
        tuple(groups[s] for s in active),
        tuple(model.kernels[s].params for s in frozen),
        jax.tree.map(jnp.asarray, live),
    )


def failures(now: Arranged) -> dict[int, int]:
    """Consecutive failures by slot, as they are counted on the device; waits for it."""
    if now.live is None:
        return {}
    return dict(zip(now.running, np.asarray(now.live.errors).tolist(), strict=True))


def reweighted(now: Arranged, seeds: SeedState) -> Live | None:
    """The live part at the alphas of `seeds`."""
    if now.live is None:
        return None
    return jax.tree.map(jnp.asarray, reweigh(now.live, seeds, now.plan))


def widened(params: Any) -> Any:
    """Parameters as they are trained: whatever precision they are computed in, in float32."""

    def of_leaf(leaf: Any) -> Any:
        leaf = as_jax(leaf)
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(of_leaf, params)


def kernel_of(artifact: Artifact, params: Params | None) -> Kernel:
    """The kernel of an artifact, with its first parameters or with others.

    Raises:
        ArtifactError: where it is refused.
        InputError: for parameters that are not the artifact's by name and shape.
    """
    kernel = load_jax_kernel(artifact)
    if params is None:
        return kernel
    expected = {name: tuple(p.shape) for name, p in kernel.params.items()}
    found = {name: tuple(np.shape(p)) for name, p in params.items()}
    if expected != found:
        raise InputError(
            f"the first parameters of kernel {artifact.kernel_id[:12]} do not fit it: expected"
            f" {expected}, got {found}. Give every parameter of the artifact, by its name"
        )
    own = {name: jnp.asarray(params[name]).astype(p.dtype) for name, p in kernel.params.items()}
    return Kernel(kernel.program, own)


def snapshot(held: Held) -> ArrayTree:
    """What was held, as numpy arrays."""
    kernels = held.model.kernels
    tree: dict[str, Any] = {
        "host": _named(held.host.params),
        "host_moments": _named(held.host.moments),
        "kernels": {
            str(s): _named(held.groups[s].params if s in held.groups else k.params)
            for s, k in kernels.items()
        },
        "moments": {str(s): _named(group.moments) for s, group in held.groups.items()},
        "seeds": state_tree(held.model.seeds),
    }
    errors = _uncounted(held)
    if errors:
        tree["errors"] = errors
    if held.host.average is not None:
        tree["host_average"] = _named(held.host.average)
        tree["averages"] = {str(s): _named(group.average) for s, group in held.groups.items()}
    if held.rest is not None:
        tree["rest"] = _named(held.rest)
    return tree


def _uncounted(held: Held) -> dict[str, np.ndarray]:
    """Failures by slot, of kernels whose seeds do not know of them yet."""
    seeds, counts = held.model.seeds, failures(held.now)
    known = {
        int(seeds.slot[place]): int(seeds.error_count[place]) for place in running_seeds(seeds)
    }
    return {
        str(slot): np.asarray(count, np.int32)
        for slot, count in counts.items()
        if count != known[slot]
    }


def read_snapshot(
    tree: ArrayTree,
    artifacts: Mapping[int, Artifact],
    own: Held,
    static: Static,
    how: Optimisation,
) -> Held:
    """What a snapshot holds, for `take_back`.

    Args:
        own: what the trainee is now, whose host the snapshot must be of.

    Raises:
        InputError: for a snapshot of another host, or of kernels without their artifacts.
        ArtifactError: for an artifact that is refused.
    """
    seeds = tree_state(tree["seeds"])
    if seeds.shape != own.model.seeds.shape:
        raise InputError(
            f"the snapshot has seeds [layers, seeds] of shape {list(seeds.shape)}, and this host"
            f" {list(own.model.seeds.shape)}: restore it into a trainee of the same configuration"
        )
    # Mappings that are empty are lost in a checkpoint.
    given = {int(slot): named for slot, named in tree.get("kernels", {}).items()}
    missing = sorted(given.keys() - artifacts.keys())
    if missing:
        raise InputError(
            f"the snapshot has kernels in the slots {missing}, whose artifacts were not given: pass"
            " them, by slot"
        )
    host = _group("the host's", own.host, tree, ("host", "host_moments", "host_average"))
    rest = own.rest
    if rest is not None:
        rest = _unnamed("the host's state", rest, tree.get("rest", {}))
    stages = _stages(seeds)
    kernels: dict[int, Kernel] = {}
    groups: dict[int, Group] = {}
    flops: dict[int, int] = {}
    for slot, named in given.items():
        born, where = load_jax_kernel(artifacts[slot]), f"in slot {slot}, the kernel's"
        flops[slot] = artifact_cost(artifacts[slot]).flops
        params = _unnamed(f"{where} parameter", widened(born.params), named)
        kernels[slot] = Kernel(born.program, params)
        if stages[slot] is SeedLifecycleState.ACTIVE:
            fresh = new_group(static, how, params)
            parts = {
                "params": named,
                **{part: tree.get(part, {}).get(str(slot), {}) for part in ("moments", "averages")},
            }
            groups[slot] = _group(where, fresh, parts, ("params", "moments", "averages"))
    model = own.model.with_seeds(seeds, kernels, step=0)
    counts = {int(slot): int(count) for slot, count in tree.get("errors", {}).items()}
    return Held(host, rest, model, groups, flops, arrange(model, groups, counts))


def _stages(seeds: SeedState) -> dict[int, SeedLifecycleState]:
    return {
        int(seeds.slot[place]): SeedLifecycleState(int(seeds.stage[place]))
        for place in np.ndindex(*seeds.shape)
    }


def _group(where: str, own: Group, tree: Mapping[str, Any], parts: tuple[str, str, str]) -> Group:
    params, moments, average = (tree.get(part, {}) for part in parts)
    found = _unnamed(f"{where} parameter", own.params, params)
    kept = None
    if own.average is not None:
        # An average that was not kept begins with its parameter.
        kept = _unnamed(f"{where} average", own.average, {**params, **average})
    return Group(found, _unnamed(f"{where} moment", own.moments, moments), kept)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """A leaf as an array: of a random key, its words."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): np.asarray(plain(leaf)) for path, leaf in leaves}


def _unnamed(what: str, template: Any, named: Mapping[str, Any]) -> Any:
    """The template with values by name in it.

    Raises:
        InputError: for values of other names or shapes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(template)
    own = {_name(path): np.shape(plain(jnp.asarray(leaf))) for path, leaf in leaves}
    for name in [*own, *(name for name in named if name not in own)]:
        expected = list(own[name]) if name in own else "nothing of that name"
        found = list(np.shape(named[name])) if name in named else "nothing of that name"
        if expected != found:
            raise InputError(
                f"the snapshot does not fit: expected {what} {name!r} of shape {expected}, found"
                f" {found}. Restore it into a trainee of the same task and configuration"
            )

    def pick(path: Any, leaf: Any) -> Any:
        value, leaf = named[_name(path)], jnp.asarray(leaf)
        if _is_key(leaf):
            return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
        return jnp.asarray(value, dtype=leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, template)

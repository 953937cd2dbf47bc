"""A trainee at one moment: kept in memory, or as the arrays of a checkpoint."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.artifacts import Artifact
from esper.errors import InputError
from esper.tensors import from_torch, to_torch
from esper.tolaria._torch_foreach import copy_all
from esper.tolaria._torch_network import Graft, TorchNetwork, make_graft, take_errors
from esper.tolaria._torch_optimiser import HOST, GroupedOptimiser
from esper.tolaria._trainee import ArrayTree, state_tree, tree_state
from esper_functional import SeedState

Tree = Mapping[str, Any]
"""Nested mappings of names to tensors."""


@dataclasses.dataclass(frozen=True)
class Held:
    """All of a trainee at one moment. Its tensors are nobody else's, and are not changed.

    Random numbers are no part of it: they are a function of seed and step.
    """

    seeds: SeedState
    step: int
    grafts: Mapping[int, Graft]
    tensors: Tree


def hold(network: TorchNetwork, optimiser: GroupedOptimiser) -> Held:
    """Copy all there is."""
    live = _live(network, optimiser)
    with torch.no_grad():
        leaves = list(_leaves(live))
        copies = [torch.empty_like(leaf) for leaf in leaves]
        copy_all(copies, leaves)
    following = iter(copies)
    kept = _mapped(live, lambda _: next(following))
    return Held(network.seeds, network.table.step, dict(network.grafts), kept)


def take_back(held: Held, network: TorchNetwork, optimiser: GroupedOptimiser) -> None:
    """Be again what was held."""
    network.become(held.seeds, held.step, held.grafts)
    training = {s: network.kernel_params(s) for s in network.grafts if network.trains(s)}
    for slot in [slot for slot in optimiser.groups if slot != HOST]:
        own, known = training.get(slot), optimiser.groups[slot].params
        # A kernel that was taken out and grafted anew has other parameters.
        if own is None or any(own[name] is not p for name, p in known.items()):
            optimiser.forget(slot)
    for slot, own in training.items():
        if slot not in optimiser.groups:
            optimiser.adopt(slot, own)
    optimiser.zero_grad()
    tensors = held.tensors
    with torch.no_grad():
        for slot in optimiser.groups:
            moments = tensors["host_moments"] if slot == HOST else tensors["moments"].get(str(slot))
            optimiser.take_moments(slot, moments or {})
        for slot, count in tensors["errors"].items():
            take_errors(network.kernel(int(slot)), count)
        live = _live(network, optimiser)
        pairs = list(_matched(live, tensors))
        copy_all([target for target, _ in pairs], [source for _, source in pairs])


def snapshot(held: Held) -> ArrayTree:
    """What was held, as numpy arrays of the same memory where it lies on a CPU."""
    tree: dict[str, Any] = _mapped(held.tensors, from_torch)
    return {**tree, "seeds": state_tree(held.seeds), "step": np.asarray(held.step, np.int32)}


def read_snapshot(
    tree: ArrayTree,
    artifacts: Mapping[int, Artifact],
    network: TorchNetwork,
) -> Held:
    """What a snapshot holds, for `take_back`; nothing is changed yet.

    Raises:
        InputError: for a snapshot of another host, or of kernels without their artifacts.
    """
    seeds = tree_state(tree["seeds"])
    if seeds.shape != network.seeds.shape:
        raise InputError(
            f"the snapshot has seeds [layers, seeds] of shape {list(seeds.shape)}, and this host"
            f" {list(network.seeds.shape)}: restore it into a trainee of the same configuration"
        )
    missing = sorted({int(slot) for slot in tree.get("kernels", {})} - artifacts.keys())
    if missing:
        raise InputError(
            f"the snapshot has kernels in the slots {missing}, whose artifacts were not given:"
            " pass them, by slot"
        )
    grafts = {int(slot): make_graft(artifacts[int(slot)]) for slot in tree.get("kernels", {})}
    # Mappings that are empty are lost in a checkpoint.
    parts = {name: tree.get(name, {}) for name in _PARTS}
    tensors = _mapped(parts, lambda array: to_torch(np.asarray(array)).to(network.device))
    # An average that was not kept begins with its parameter.
    tensors["host_average"] = {**tensors["host"], **tensors["host_average"]}
    tensors["averages"] = {**tensors["kernels"], **tensors["averages"]}
    _check("the host's parameter", network.host, tensors["host"])
    _check("the host's buffer", network.buffers, tensors["buffers"])
    for slot, graft in grafts.items():
        params = {name: torch.as_tensor(p) for name, p in graft.kernel.params.items()}
        _check(f"in slot {slot}, the kernel's parameter", params, tensors["kernels"][str(slot)])
    step = int(np.asarray(tree["step"])) if "step" in tree else 0
    return Held(seeds, step, grafts, tensors)


_PARTS = (
    *("host", "buffers", "host_moments", "host_average"),
    *("kernels", "errors", "moments", "averages"),
)
"""The names of a snapshot's parts: the host's, and the kernels' by slot."""


def _live(network: TorchNetwork, optimiser: GroupedOptimiser) -> dict[str, Any]:
    """The tensors themselves, by the parts of a snapshot."""
    kernels = sorted(network.grafts)
    stepped = [slot for slot in kernels if slot in optimiser.groups]
    return {
        "host": dict(network.host),
        "buffers": network.buffers,
        "host_moments": optimiser.moments(HOST),
        "host_average": optimiser.groups[HOST].averages,
        "kernels": {str(slot): dict(network.kernel_params(slot)) for slot in kernels},
        "errors": {str(slot): network.kernel(slot).errors for slot in kernels},
        "moments": {str(slot): own for slot in stepped if (own := optimiser.moments(slot))},
        "averages": {
            str(slot): own for slot in stepped if (own := optimiser.groups[slot].averages)
        },
    }


def _check(what: str, own: Mapping[str, Tensor], given: Tree) -> None:
    for name in [*own, *(name for name in given if name not in own)]:
        expected = list(own[name].shape) if name in own else "nothing of that name"
        found = list(given[name].shape) if name in given else "nothing of that name"
        if expected != found:
            raise InputError(
                f"the snapshot does not fit: expected {what} {name!r} of shape {expected}, found"
                f" {found}. Restore it into a trainee of the same task and configuration"
            )


def _leaves(tree: Tree) -> Iterator[Tensor]:
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value


def _mapped(tree: Tree, function: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        name: _mapped(value, function) if isinstance(value, Mapping) else function(value)
        for name, value in tree.items()
    }


def _matched(live: Tree, held: Tree) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors of one name."""
    for name, value in live.items():
        if name not in held:
            continue
        if isinstance(value, Mapping):
            yield from _matched(value, held[name])
        else:
            yield value, held[name]

"""Which layers of a torch model can carry seeds, and which its host would pass by."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from esper_adapters.pytorch._layer import SeededLayer
from esper_functional import SeedIndexError

Target = type | str | Callable[[str, nn.Module], bool]
"""A class of layers; a module path, in which `*` stands for anything; or a predicate."""


def check_targets(targets: Any) -> tuple[Target, ...]:
    """Several targets, or a lone one, as a tuple.

    Raises:
        SeedIndexError: for what is no target.
    """
    lone = isinstance(targets, str | type) or callable(targets)
    many: tuple[Any, ...] = (
        (targets,) if lone or not isinstance(targets, Iterable) else tuple(targets)
    )
    if not many:
        raise SeedIndexError("wrap: target_layers is empty: name types of layers, or paths")
    for target in many:
        if not (isinstance(target, str | type) or callable(target)):
            raise SeedIndexError(
                "wrap: target_layers takes types of layers, paths such as 'blocks.*.mlp', and"
                f" predicates of (path, module); got {target!r}"
            )
    return many


def matches(target: Target, name: str, module: nn.Module) -> bool:
    """Whether a target means a module."""
    if isinstance(target, str):
        return fnmatchcase(name, target)
    if isinstance(target, type):
        return isinstance(module, target)
    return bool(target(name, module))


def select_sites(
    host: nn.Module, targets: Sequence[Target]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The paths of the modules that carry seeds, and why others that were meant do not.

    A module at several paths is one site, by the first of them.

    Raises:
        SeedIndexError: for a target that no module matches, with the nearest names.
    """
    passed_by = _passed_by(host)
    modules = dict(host.named_modules())
    chosen: dict[str, None] = {}
    left: dict[str, str] = {}
    for target in targets:
        hits = [name for name, module in modules.items() if matches(target, name, module)]
        if not hits:
            raise _nothing(target, modules)
        for name in hits:
            reason = passed_by.get(name) or _unfit(modules[name])
            if reason is None:
                chosen[name] = None
            else:
                left[name] = reason
    if not chosen:
        name, reason = next(iter(left.items()))
        raise SeedIndexError(
            f"wrap: no layer that was meant can carry seeds; {name!r}, for one, {reason}"
        )
    return tuple(name for name in modules if name in chosen), left


def _unfit(module: nn.Module) -> str | None:
    """Why a module cannot carry seeds, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled TorchScript, whose class cannot be another"
    if type(module).forward is nn.Module.forward:
        return "has no forward of its own: its host calls what is in it"
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return "may go through all modules in it, and kernels would be among them: wrap the layers"
    lazy: Any = module
    if isinstance(module, LazyModuleMixin) and lazy.has_uninitialized_params():
        return "has no parameters yet: call the model once before it is wrapped"
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        return "has an extra state of its own in its state_dict, where its seeds would be written"
    taken = _names_of(module) & _public(SeededLayer)
    if taken:
        return f"has attributes of its own, {sorted(taken)}, which a layer with seeds has too"
    if "forward" in vars(module):
        return "has a forward of its own beside its class's, which goes by seeds"
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is not None and _OF_CHILDREN & set(code.co_names):
        return (
            "goes through all its children when it is called, and kernels would be among them:"
            " wrap the layers in it"
        )
    return None


def _public(cls: type) -> set[str]:
    """The names that a class of Esper's has beyond those of every module."""
    names = {*dir(cls), *cls.__annotations__} - set(dir(nn.Module))
    return {name for name in names if not name.startswith("__")}


def _names_of(module: nn.Module) -> set[str]:
    """The names that a module has beyond those of every module."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return (own | set(dir(type(module)))) - set(dir(nn.Module))


def clashes(host: nn.Module, cls: type) -> list[str]:
    """The names of a host that a class of Esper's would hide."""
    meant = {"_ddp_params_and_buffers_to_ignore"}  # a host's own is asked for, too
    return sorted((_names_of(host) & _public(cls)) - meant)


_OF_CHILDREN = {"children", "named_children", "_modules"}
"""By these names a forward reaches whatever its module holds."""


def _passed_by(host: nn.Module) -> dict[str, str]:
    """The modules whose weights their hosts use without calling them."""
    found: dict[str, str] = {}
    for name, module in host.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            found[f"{prefix}out_proj"] = (
                "is used by nn.MultiheadAttention without being called: wrap the attention itself"
            )
    return found


def fused_hosts(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    """What a module lies in that has a fused evaluation path, which calls nothing within.

    An `nn.TransformerEncoderLayer` has one for itself; an `nn.TransformerEncoder` may give its
    layers nested tensors, which are for that path alone.
    """
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    fused = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
    return tuple(module for module in around if isinstance(module, fused))


def _nothing(target: Target, modules: dict[str, nn.Module]) -> SeedIndexError:
    names = [name for name in modules if name]
    if isinstance(target, str):
        near = difflib.get_close_matches(target, names, n=3)
        hint = f"the nearest are {near}" if near else f"there are {_few(names)}"
        return SeedIndexError(f"wrap: no module's path matches {target!r}; {hint}")
    kinds = sorted({type(module).__name__ for module in modules.values()})
    if isinstance(target, type):
        near = difflib.get_close_matches(target.__name__, kinds, n=3)
        hint = f"; the nearest are {near}" if near else ""
        return SeedIndexError(
            f"wrap: the model has no layer of type {target.__name__}: it is made of"
            f" {_few(kinds)}{hint}. Choose others by target_layers"
        )
    return SeedIndexError(f"wrap: the predicate is true of no module; there are {_few(names)}")


def _few(names: Sequence[str]) -> str:
    return f"{list(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")

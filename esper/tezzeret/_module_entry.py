"""From a user's own module of torch to an artifact."""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.artifacts import (
    Artifact,
    load_stablehlo,
    load_torchscript,
    normalise_torchscript,
    scan_torchscript,
)
from esper.contracts import KernelSignature
from esper.errors import ArtifactError, InputError, KernelCompilationError
from esper.tensors import from_torch
from esper.tezzeret._compile import library_versions
from esper.tezzeret._contract import Birth
from esper.tezzeret._own_kernel import (
    check_asked,
    check_params,
    export_function,
    own_kernel,
    write_own,
)
from esper.tezzeret._parity import check_parity
from esper.tezzeret._programs import script_method, torchscript_archive
from esper.tezzeret._replacements import REPLACEMENTS
from esper.tezzeret._torch2jax import check_replacements, jax_function, require_torch2jax
from esper.tezzeret._torch_calls import Line, Ref, line_source
from esper.tezzeret._torch_export import export_line

if TYPE_CHECKING:
    from torch import nn


def compile_module(
    module: "nn.Module",
    signature: KernelSignature,
    *,
    name: str | None = None,
    birth: Birth = "free",
    confidence: float = 0.5,
    replacements: Mapping[str, Callable[..., Any]] | None = None,
) -> Artifact:
    """Make an artifact of a module of torch, which takes a batch and gives one.

    `torch.export` turns the module into a straight line of operations, out of which come both
    programs: TorchScript, and StableHLO by way of torch2jax. Each is compared with the module
    itself, and with the other, in output and gradients, with the module's own parameters and with
    others about them.

    The kernel is the module in evaluation: dropout is off, and batch norm uses the statistics it
    has gathered. Every parameter is trained, and tied ones are one. Buffers are constants of the
    programs. Equal modules give equal bytes on any machine; the module itself is not changed.

    Args:
        module: its parameters are float, of the signature's dtype.
        signature: shapes of one example; the batch's axis comes before them.
        name: what the kernel is called; by default, as the module's class.
        birth: what its output is until the first update: "zero", "identity" or anything, "free".
        confidence: scales the first alpha of a kernel that is not ramped.
        replacements: functions of jax for public functions of torch that torch2jax does not follow
            as they are called, by names such as `nn.functional.max_pool2d`. They take arrays and
            torch's arguments; the gate holds them to what torch computes.

    Raises:
        InputError: for what is no module, or an argument out of range.
        KernelCompilationError: saying why the module cannot be a kernel, and what to do.
    """
    from torch import nn

    if not isinstance(module, nn.Module):
        raise InputError(
            f"compile_module takes a torch.nn.Module, got {type(module).__name__}: a function of"
            " jax goes to compile_function"
        )
    called = type(module).__name__ if name is None else name
    check_asked(signature, called, birth, confidence)
    check_replacements(replacements or {})
    require_torch2jax()
    followed = {**REPLACEMENTS, **(replacements or {})}
    versions = library_versions(also=("torch2jax",))
    try:
        _check_forward(module)
        return _compiled(module, signature, called, birth, confidence, followed, versions)
    except KernelCompilationError as error:
        raise KernelCompilationError(
            f"module {called!r} for {signature} was refused: {error}"
        ) from error


def _compiled(
    module: Any,
    signature: KernelSignature,
    name: str,
    birth: Birth,
    confidence: float,
    followed: Mapping[str, Callable[..., Any]],
    versions: dict[str, str],
) -> Artifact:
    import torch

    # Gradients are compared, whatever mode the caller is in.
    with torch.inference_mode(False), torch.enable_grad():
        plain = _evaluated(module)
        params = _parameters(plain, signature)
        line = export_line(plain, signature)
        _check_all_used(line)
        torchscript = _torchscript(line)
        stablehlo, vjp_order = export_function(
            jax_function(line, replacements=followed), params, signature
        )
        # The gates run what was written, not what it was written from.
        run, checked = load_stablehlo(stablehlo).call, own_kernel(params, signature)
        for program in (_called(plain), load_torchscript(torchscript)):
            check_parity(checked, run, program, own=params)
        return write_own(
            origin="module",
            name=name,
            signature=signature,
            birth=birth,
            confidence=confidence,
            params=params,
            stablehlo=stablehlo,
            vjp_order=vjp_order,
            run=run,
            torchscript=torchscript,
            versions=versions,
        )


def _check_forward(module: Any) -> None:
    required = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise KernelCompilationError(
            f"its forward takes {len(required)} inputs ({', '.join(required)}): a kernel takes"
            " one, what its layer takes. Give the others defaults, or wrap the module in one that"
            " supplies them"
        )


def _evaluated(module: Any) -> Any:
    """A copy of the module, in evaluation and on the CPU."""
    from torch import nn

    held = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in held:
        lazy = isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)
        if lazy or tensor.is_meta:
            raise KernelCompilationError(
                f"its {name!r} holds no values ({'lazy' if lazy else 'on the meta device'}): run"
                " the module once, or load its weights, first"
            )
    for name, part in module.named_modules():
        if getattr(part, "num_batches_tracked", None) is not None and not part.num_batches_tracked:
            raise KernelCompilationError(
                f"its {type(part).__name__} {name!r} has seen no data: a kernel holds batch norm's"
                " statistics as constants. Run the module in training first, use group norm, or"
                " the blueprint operation batch_norm, which takes those of each batch"
            )
    try:
        return copy.deepcopy(module).cpu().eval()
    except Exception as error:  # whatever a user's own __deepcopy__ raises
        raise KernelCompilationError(
            f"it cannot be copied ({type(error).__name__}: {error}): a kernel's parameters are"
            " leaves, made by nn.Parameter"
        ) from error


def _parameters(module: Any, signature: KernelSignature) -> dict[str, np.ndarray]:
    params = {}
    for name, parameter in module.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        if dtype != signature.dtype:
            raise KernelCompilationError(
                f"its parameter {name!r} is {dtype}: expected {signature.dtype}, as the signature"
                f" says. Convert it by module.to(torch.{signature.dtype}), or ask for another"
                " signature"
            )
        if not parameter.requires_grad:
            raise KernelCompilationError(
                f"its parameter {name!r} is frozen, and all parameters of an artifact are trained:"
                " make it a buffer, which is a constant, or set requires_grad"
            )
        params[name] = np.ascontiguousarray(from_torch(parameter))
    check_params(params, signature)
    return params


def _check_all_used(line: Line) -> None:
    read = {
        value.name
        for call in line.calls
        for given in call.arguments.values()
        for value in (given if isinstance(given, tuple) else (given,))
        if isinstance(value, Ref)
    }
    unused = [name for name, place in line.parameters.items() if place not in read]
    if unused:
        raise KernelCompilationError(
            f"its parameter {unused[0]!r} takes no part in its output, so that it would never"
            " learn: remove it"
        )


def _torchscript(line: Line) -> bytes:
    with warnings.catch_warnings():
        # TorchScript is deprecated by torch and is what it can load without Python code.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            archive = normalise_torchscript(torchscript_archive(script_method(line_source(line))))
            scan_torchscript(archive)
        except (RuntimeError, ArtifactError) as error:
            raise KernelCompilationError(
                f"it cannot be written as TorchScript ({error}): write the kernel as a blueprint"
                " or as a function of jax"
            ) from error
    return archive


def _called(module: Any) -> Any:
    """The module itself as `program(params..., x)`."""
    from torch.func import functional_call

    names = [name for name, _ in module.named_parameters()]

    def run(*tensors: Any) -> Any:
        return functional_call(module, dict(zip(names, tensors, strict=False)), (tensors[-1],))

    return run

"""What the entries for users' own kernels share: parameters, export, gates, and the artifact."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from esper.artifacts import Artifact, load_stablehlo, serialise_stablehlo, trust, write_artifact
from esper.contracts import KernelSignature
from esper.errors import ArtifactError, InputError, KernelCompilationError
from esper.tezzeret._contract import Birth, check_birth
from esper.tezzeret._resolve import ParameterSpec, check_signature

PLATFORMS = ("cpu", "cuda")
_LONGEST_NAME = 64

_RANDOM = ("random_", "threefry", "rng_")
"""How the names of jax's primitives that draw numbers begin."""


@dataclasses.dataclass(frozen=True)
class OwnKernel:
    """What the gates know of a user's own kernel."""

    signature: KernelSignature
    parameters: tuple[ParameterSpec, ...]


def own_kernel(params: Mapping[str, np.ndarray], signature: KernelSignature) -> OwnKernel:
    """The kernel of these parameters; all are trained."""
    specs = tuple(
        ParameterSpec(name, tuple(value.shape), "fan_in", _fan_in(value.shape))
        for name, value in params.items()
    )
    return OwnKernel(signature, specs)


def _fan_in(shape: tuple[int, ...]) -> int:
    inner = 1
    for size in shape[1:] or shape:
        inner *= size
    return max(1, inner)


def check_asked(signature: Any, name: Any, birth: Any, confidence: Any) -> None:
    """Check what was asked for, and what the artifact is to say of itself.

    Raises:
        InputError: naming the argument.
    """
    check_signature(signature)
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise InputError(
            f"`name` must be a text of 1 to {_LONGEST_NAME} printable characters, got {name!r}"
        )
    if birth not in get_args(Birth):
        raise InputError(f"`birth` must be one of {', '.join(get_args(Birth))}, got {birth!r}")
    if not isinstance(confidence, int | float) or not 0.0 <= confidence <= 1.0:
        raise InputError(f"`confidence` must be a number from 0 to 1, got {confidence!r}")


def check_params(params: Mapping[str, np.ndarray], signature: KernelSignature) -> None:
    """Check that every parameter can be trained in the signature's dtype.

    Raises:
        KernelCompilationError: naming the first that cannot.
    """
    if not params:
        raise KernelCompilationError(
            "it has no parameters: a kernel is trained, and needs at least one"
        )
    for name, value in params.items():
        if value.dtype.name != signature.dtype:
            raise KernelCompilationError(
                f"its parameter {name!r} is {value.dtype.name}: expected {signature.dtype}, as the"
                f" signature says. Convert it, or ask for a signature of {value.dtype.name} where"
                " there is one"
            )
        if not np.isfinite(value.astype(np.float32)).all():
            raise KernelCompilationError(f"its parameter {name!r} is not finite")


def export_function(
    apply: Callable[[dict[str, Any], Any], Any],
    params: Mapping[str, np.ndarray],
    signature: KernelSignature,
) -> tuple[bytes, int]:
    """The StableHLO of `apply(params, x)` with the batch's size left open, and its VJPs' order.

    Raises:
        KernelCompilationError: where it does not trace, draws random numbers, gives something
            else than the signature says, or holds what a program may not.
    """
    (batch,) = export.symbolic_shape("b")
    dtype = jnp.dtype(signature.dtype)
    specs = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in params.items()}
    x = jax.ShapeDtypeStruct((batch, *signature.input_shape), dtype)
    try:
        traced = jax.jit(apply).trace(specs, x)
    except KernelCompilationError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise KernelCompilationError(
            "jax cannot trace it over a batch of any size, x being"
            f" {signature.dtype}[b, {', '.join(map(str, signature.input_shape))}]"
            f" ({first_line(error)}): what is computed may not depend on values, nor on what the"
            " batch's size is"
        ) from error
    _check_output(traced.out_info, batch, signature)
    drawn = sorted(_drawing(traced.jaxpr.jaxpr))
    if drawn:
        raise KernelCompilationError(
            f"it draws random numbers ({', '.join(drawn)}): a kernel is a function of its"
            " parameters and its input. Turn dropout off, or leave noise to the host"
        )
    try:
        exported = export.export(jax.jit(apply), platforms=PLATFORMS)(specs, x)
        stablehlo, order = serialise_stablehlo(exported)
        load_stablehlo(stablehlo)
    except ArtifactError as error:
        raise KernelCompilationError(
            f"{error}. Kernels are straight lines of operations: no loops, sorting or callbacks"
        ) from error
    except Exception as error:  # of jax.export, which has many
        raise KernelCompilationError(
            f"jax cannot export it or its gradient ({first_line(error)}): write it with operations"
            " that jax.export takes and that can be differentiated in reverse"
        ) from error
    return stablehlo, order


def first_line(error: Exception) -> str:
    """An error's kind and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _check_output(found: Any, batch: Any, signature: KernelSignature) -> None:
    expected = f"{signature.dtype}[b, {', '.join(map(str, signature.output_shape))}]"
    if not hasattr(found, "shape") or not hasattr(found, "dtype"):
        raise KernelCompilationError(
            f"it gives a {type(found).__name__}: expected one array {expected}"
        )
    shape = tuple(found.shape)
    given = f"{found.dtype.name}[{', '.join(map(str, shape))}]"
    if shape[:1] != (batch,):
        raise KernelCompilationError(
            f"its output is {given}, without the batch's axis b at the front: expected {expected}"
        )
    if shape[1:] != signature.output_shape or found.dtype.name != signature.dtype:
        raise KernelCompilationError(f"its output is {given}, the signature says {expected}")


def _drawing(jaxpr: Any) -> set[str]:
    """The primitives of a jaxpr that draw random numbers, of those within it too."""
    found: set[str] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(_RANDOM):
            found.add(equation.primitive.name)
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= _drawing(inner)
    return found


def write_own(
    *,
    origin: Literal["module", "function"],
    name: str,
    signature: KernelSignature,
    birth: Birth,
    confidence: float,
    params: dict[str, np.ndarray],
    stablehlo: bytes,
    vjp_order: int,
    run: Callable[..., Any],
    torchscript: bytes | None,
    versions: dict[str, str],
) -> Artifact:
    """Check the claim of birth and put the artifact together.

    Args:
        run: the StableHLO that was written, to be called.

    Raises:
        KernelCompilationError: where the claim is false.
    """
    check_birth(own_kernel(params, signature), run, params, birth)
    digest = hashlib.sha256()
    for key, value in params.items():
        head = json.dumps([key, list(value.shape), value.dtype.name])
        digest.update(head.encode() + np.ascontiguousarray(value).tobytes())
    content = {
        "origin": origin,
        "name": name,
        "signature": str(signature),
        "birth": birth,
        "confidence": confidence,
        "params": digest.hexdigest(),
        "stablehlo": hashlib.sha256(stablehlo).hexdigest(),
        "torchscript": None if torchscript is None else hashlib.sha256(torchscript).hexdigest(),
        "versions": versions,
    }
    artifact = write_artifact(
        blueprint_name=name,
        origin=origin,
        recipe=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        blueprint=None,
        signature=signature,
        sizes={},
        birth=birth,
        confidence=confidence,
        init_seed=0,
        params=params,
        stablehlo=stablehlo,
        torchscript=torchscript,
        versions=versions,
        vjp_order=vjp_order,
    )
    # Its gates ran it in this process, and it came of what this process holds.
    trust(artifact)
    return artifact

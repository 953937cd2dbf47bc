"""From a user's own function of jax, or module of Equinox or Flax, to an artifact.

Its StableHLO is the artifact's one program: torch runs it over the bridge.
"""

import hashlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from esper.artifacts import Artifact, load_stablehlo
from esper.contracts import KernelSignature
from esper.errors import InputError, KernelCompilationError
from esper.tezzeret._compile import library_versions
from esper.tezzeret._contract import Birth
from esper.tezzeret._own_kernel import (
    check_asked,
    check_params,
    export_function,
    first_line,
    own_kernel,
    write_own,
)
from esper.tezzeret._parity import check_parity, run_jax
from esper_functional import Kernel, Program

if TYPE_CHECKING:
    import equinox
    from flax import nnx


def compile_function(
    function: Callable[[Any, Any], Any],
    params: Any,
    signature: KernelSignature,
    *,
    name: str | None = None,
    birth: Birth = "free",
    confidence: float = 0.5,
) -> Artifact:
    """Make an artifact of `function(params, x)`, a function of jax over a batch.

    What is written is compared with the function, in output and gradients, with these parameters
    and with others about them; and, where torch is installed, with itself as torch runs it, over
    the bridge. Equal functions and parameters give equal bytes on any machine.

    Args:
        function: pure; takes the parameters and `x[batch, *input_shape]`, gives
            `[batch, *output_shape]`. The batch may have any size.
        params: a tree of arrays of the signature's dtype, at birth. All of them are trained. In
            the artifact each is called by its path, such as `layers.0.weight`; a lone one `param`.
        signature: shapes of one example, and the dtype.
        name: what the kernel is called; by default, as the function.
        birth: what its output is until the first update: "zero", "identity" or anything, "free".
        confidence: scales the first alpha of a kernel that is not ramped.

    Raises:
        InputError: for what is no function, or an argument out of range.
        KernelCompilationError: saying why the function cannot be a kernel, and what to do.
    """
    if not callable(function):
        raise InputError(
            "compile_function takes a function of (params, x), got"
            f" {type(function).__name__}: give the function itself, and its parameters beside it"
        )
    called = _called(function) if name is None else name
    return _compile(function, params, signature, "function", called, birth, confidence)


def compile_equinox(
    module: "equinox.Module",
    signature: KernelSignature,
    *,
    name: str | None = None,
    birth: Birth = "free",
    confidence: float = 0.5,
) -> Artifact:
    """Make an artifact of a module of Equinox, called with one example; see `compile_function`.

    Its floating-point arrays are the parameters, and everything else is constant. Dropout is off,
    as by `equinox.nn.inference_mode`.

    Args:
        module: takes `[*input_shape]` and gives `[*output_shape]`.
        signature: shapes of one example, and the dtype.
        name: what the kernel is called; by default, as the module's class.
        birth: what its output is until the first update: "zero", "identity" or anything, "free".
        confidence: scales the first alpha of a kernel that is not ramped.

    Raises:
        InputError: for what is no callable module of Equinox, or an argument out of range.
        KernelCompilationError: saying why the module cannot be a kernel, and what to do.
    """
    import equinox as eqx

    if not isinstance(module, eqx.Module) or not callable(module):
        raise InputError(
            f"compile_equinox takes an equinox.Module that can be called, got"
            f" {type(module).__name__}"
        )
    params, static = eqx.partition(eqx.nn.inference_mode(module), eqx.is_inexact_array)

    def apply(params: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    called = type(module).__name__ if name is None else name
    return _compile(apply, params, signature, "module", called, birth, confidence)


def compile_flax(
    module: "nnx.Module",
    signature: KernelSignature,
    *,
    name: str | None = None,
    birth: Birth = "free",
    confidence: float = 0.5,
) -> Artifact:
    """Make an artifact of a module of Flax NNX, called with a batch; see `compile_function`.

    Its `nnx.Param`s are the parameters, and everything else is constant. It is in evaluation:
    dropout is off, and batch norm uses the statistics it has gathered. The module itself is not
    changed.

    Args:
        module: takes `[batch, *input_shape]` and gives `[batch, *output_shape]`.
        signature: shapes of one example, and the dtype.
        name: what the kernel is called; by default, as the module's class.
        birth: what its output is until the first update: "zero", "identity" or anything, "free".
        confidence: scales the first alpha of a kernel that is not ramped.

    Raises:
        InputError: for what is no callable module of Flax NNX, or an argument out of range.
        KernelCompilationError: saying why the module cannot be a kernel, and what to do.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module) or not callable(module):
        raise InputError(
            f"compile_flax takes a flax.nnx.Module that can be called, got"
            f" {type(module).__name__}: a linen module goes to compile_function, as"
            " lambda params, x: module.apply({'params': params}, x)"
        )
    evaluated = nnx.clone(module)
    evaluated.eval()
    graph, state, rest = nnx.split(evaluated, nnx.Param, ...)

    flat = dict(nnx.to_flat_state(state))
    paths = {".".join(map(str, path)): path for path in flat}

    def apply(params: Any, x: Any) -> Any:
        own = [(path, flat[path].replace(params[name])) for name, path in paths.items()]
        # The merged module is thrown away, with whatever a call changes in it.
        return nnx.merge(graph, nnx.from_flat_state(own), rest)(x)

    params = {name: flat[path][...] for name, path in paths.items()}
    called = type(module).__name__ if name is None else name
    return _compile(apply, params, signature, "module", called, birth, confidence)


def _called(function: Any) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return "function" if name == "<lambda>" else name


def _compile(
    function: Callable[[Any, Any], Any],
    params: Any,
    signature: KernelSignature,
    what: Literal["module", "function"],
    name: str,
    birth: Birth,
    confidence: float,
) -> Artifact:
    check_asked(signature, name, birth, confidence)
    versions = library_versions(torch=False)
    try:
        arrays, structure = _flat(params)
        check_params(arrays, signature)

        def apply(flat: Mapping[str, Any], x: Any) -> Any:
            return function(jax.tree.unflatten(structure, [flat[key] for key in arrays]), x)

        stablehlo, vjp_order = export_function(apply, arrays, signature)
        # The gates run what was written, not what it was written from.
        run = load_stablehlo(stablehlo).call
        check_parity(own_kernel(arrays, signature), run, apply, own=arrays, run_other=run_jax)
        _check_bridge(run, stablehlo, arrays, signature)
        return write_own(
            origin=what,
            name=name,
            signature=signature,
            birth=birth,
            confidence=confidence,
            params=arrays,
            stablehlo=stablehlo,
            vjp_order=vjp_order,
            run=run,
            torchscript=None,
            versions=versions,
        )
    except KernelCompilationError as error:
        raise KernelCompilationError(
            f"{what} {name!r} for {signature} was refused: {error}"
        ) from error


def _flat(params: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Parameters by their paths, and what tree they are the leaves of."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "param"
        if name in arrays:
            raise KernelCompilationError(
                f"two of its parameters are called {name!r}: name them apart"
            )
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise KernelCompilationError(
                f"its parameter {name!r} is a {type(leaf).__name__}: expected an array. Close the"
                " function over what is not trained"
            )
        try:
            arrays[name] = np.ascontiguousarray(leaf).reshape(leaf.shape)
        except Exception as error:  # a deleted array, or a traced one
            raise KernelCompilationError(
                f"its parameter {name!r} holds no values ({first_line(error)})"
            ) from error
    return arrays, structure


def _check_bridge(
    run: Callable[..., Any],
    stablehlo: bytes,
    params: dict[str, np.ndarray],
    signature: KernelSignature,
) -> None:
    """Compare the program with itself as torch runs it, where there is torch."""
    if find_spec("torch") is None:
        return
    from esper_adapters.pytorch import kernel_from_jax

    # JAX flattens a mapping in the order of its names.
    ordered = {name: params[name] for name in sorted(params)}
    key = f"stablehlo:{hashlib.sha256(stablehlo).hexdigest()}"
    kernel = Kernel(
        Program(key, run, len(signature.input_shape), batches=False),
        {name: jax.numpy.asarray(value) for name, value in ordered.items()},
    )
    program = kernel_from_jax(kernel).program
    check_parity(own_kernel(ordered, signature), run, program, own=ordered)

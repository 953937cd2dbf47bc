"""The static scan of an artifact: what its programs hold, and that they are its own."""

from typing import Any

import jax

from esper.artifacts._artifact import Artifact
from esper.artifacts._cost import Cost
from esper.artifacts._stablehlo import scan_exported
from esper.artifacts._torchscript import scan as scan_torchscript
from esper.errors import ArtifactError


def scan_sources(artifact: Artifact) -> None:
    """The part of `scan` that is pure Python, and parses nothing in native code.

    Raises:
        ArtifactError: saying what was found.
    """
    if artifact.torchscript is None:
        return
    found, expected = scan_torchscript(artifact.torchscript), len(artifact.params) + 1
    if found != expected:
        raise ArtifactError(
            f"its TorchScript takes {found} tensors, its manifest says {expected}: each parameter"
            " and the input"
        )


def scan_program(artifact: Artifact) -> Cost:
    """The part of `scan` that parses in native code.

    Raises:
        ArtifactError: saying what was found.
    """
    exported, cost = scan_exported(artifact.stablehlo)
    signature = artifact.manifest.signature
    expected = {
        **{f"parameter {p.name}": (p.shape, p.dtype) for p in artifact.manifest.parameters},
        "input": (("b", *signature.input_shape), signature.dtype),
        "output": (("b", *signature.output_shape), signature.dtype),
    }
    found = _arguments(exported.in_tree, exported.in_avals)
    if len(exported.out_avals) == 1:
        found["output"] = _shape_of(exported.out_avals[0])
    if found != expected:
        odd = sorted(
            f"{name}: {found.get(name, 'none')}, expected {expected.get(name, 'none')}"
            for name in found.keys() | expected.keys()
            if found.get(name) != expected.get(name)
        )
        raise ArtifactError(f"its StableHLO contradicts its manifest: {'; '.join(odd)[:1000]}")
    order, last = 0, exported
    while last.has_vjp():
        order, last = order + 1, last.vjp()
    if order == 0:
        raise ArtifactError("its StableHLO has no VJP, and could not be trained")
    if order < artifact.manifest.vjp_order:
        raise ArtifactError(
            f"its StableHLO contradicts its manifest: it has VJPs of order {order}, the manifest"
            f" promises {artifact.manifest.vjp_order}"
        )
    return cost


Shape = tuple[tuple[int | str, ...], str]


def _shape_of(aval: Any) -> Shape:
    shape = tuple(axis if isinstance(axis, int) else "b" for axis in aval.shape)
    return shape, aval.dtype.name


def _arguments(tree: Any, avals: tuple[Any, ...]) -> dict[str, Shape]:
    """Shapes and dtypes of `(params, x)`, by name."""
    given, named = jax.tree.unflatten(tree, [_shape_of(aval) for aval in avals])
    is_program = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], dict)
    if not is_program or named:
        raise ArtifactError("its StableHLO does not take (params, x)")
    return {f"parameter {name}": shape for name, shape in given[0].items()} | {"input": given[1]}


def scan(artifact: Artifact) -> None:
    """Refuse an artifact whose programs could do more than compute within bounds; runs nothing.

    Both programs, and every VJP that the first one holds. StableHLO is parsed in native code:
    what comes from elsewhere is to be given to `verify`, which does that in a child process first.

    Raises:
        ArtifactError: saying what was found.
    """
    scan_sources(artifact)
    scan_program(artifact)

"""What a compiled program depends on in its arguments, and in the thread that asks for it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from esper.errors import EsperError

_SETTINGS: dict[str, Any] = {
    name: getattr(jax, name)
    for name in (
        "allow_f16_reductions", "default_device", "default_matmul_precision", "default_prng_impl",
        "enable_custom_prng", "enable_x64", "legacy_prng_key", "numpy_dtype_promotion",
        "numpy_rank_promotion", "softmax_custom_jvp", "threefry_partitionable",
    )
    if hasattr(jax, name)
}  # fmt: skip
"""Settings of jax that change programs and that a thread can have for itself."""


class _Context(NamedTuple):
    """What jax would trace under in the thread that made it."""

    settings: tuple[Any, ...]
    mesh: jax.sharding.Mesh

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for setting, value in zip(_SETTINGS.values(), self.settings, strict=True):
                stack.enter_context(setting(value))
            if not self.mesh.empty:
                stack.enter_context(jax.set_mesh(self.mesh))
            yield


def _context_here() -> _Context:
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError as error:
        raise EsperError(
            "a compiled program was asked for inside jit, grad or vmap: ask outside of them, or"
            " call the step that it is compiled from"
        ) from error
    return _Context(tuple(setting.value for setting in _SETTINGS.values()), mesh)


@cache
def _on(device: Any) -> SingleDeviceSharding:
    return SingleDeviceSharding(device)


def _default_placement(context: _Context) -> jax.sharding.Sharding | None:
    """Where arrays go that are committed to nothing; None where a mesh decides."""
    if not context.mesh.empty:
        return None
    chosen = jax.default_device.value  # a device, the name of a platform, or None
    return _on(chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0])


class _Placement:
    """A sharding that equals every other one which lays out the array in the same way."""

    __slots__ = ("_rank", "sharding")

    def __init__(self, sharding: jax.sharding.Sharding, rank: int) -> None:
        self.sharding = sharding
        self._rank = rank

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Placement) or self._rank != other._rank:
            return False
        return self.sharding.is_equivalent_to(other.sharding, self._rank)

    def __hash__(self) -> int:
        return hash((self._rank, len(self.sharding.device_set)))


class _Type(NamedTuple):
    """What a program depends on in one of its arguments."""

    aval: Any
    placement: _Placement | None
    """None for what is committed to no device, or to the default one."""

    def spec(self) -> jax.ShapeDtypeStruct:
        sharding = None if self.placement is None else self.placement.sharding
        aval = self.aval
        return jax.ShapeDtypeStruct(
            aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type
        )


def _type_of(leaf: Any, default: jax.sharding.Sharding | None) -> _Type:
    aval: Any = jax.typeof(leaf)
    sharding = None
    if isinstance(leaf, jax.ShapeDtypeStruct) or (isinstance(leaf, jax.Array) and leaf.committed):
        sharding = leaf.sharding
    # Results of one program may be committed to the device that the arguments were on
    # without commitment; they are no reason for a second program.
    if sharding is None or sharding == default:
        return _Type(aval, None)
    return _Type(aval, _Placement(sharding, len(aval.shape)))


def _types_of(
    args: tuple[Any, ...], default: jax.sharding.Sharding | None
) -> tuple[Any, tuple[_Type, ...]]:
    """The structure of arguments, and the types of their leaves."""
    leaves, structure = jax.tree.flatten(args)
    try:
        return structure, tuple(_type_of(leaf, default) for leaf in leaves)
    except TypeError:
        for path, leaf in jax.tree_util.tree_leaves_with_path(args):
            try:
                _type_of(leaf, default)
            except TypeError as error:
                raise TypeError(
                    f"args{jax.tree_util.keystr(path)} of a compiled program is a"
                    f" {type(leaf).__name__}: expected an array or a jax.ShapeDtypeStruct; what"
                    " is static belongs into the plan"
                ) from error
        raise


class Signature(NamedTuple):
    """Hashable; equal for arguments that one program serves. Holds no array."""

    structure: Any
    types: tuple[_Type, ...]
    context: _Context

    def specs(self) -> tuple[Any, ...]:
        """Arguments of this signature, with a ShapeDtypeStruct for each array."""
        return jax.tree.unflatten(self.structure, [each.spec() for each in self.types])

    def zeros(self) -> tuple[Any, ...] | None:
        """New arrays of this signature; None where an argument is a typed random key."""
        specs = [each.spec() for each in self.types]
        if any(jax.numpy.issubdtype(spec.dtype, jax.dtypes.extended) for spec in specs):
            return None
        # By way of numpy: jax would compile a program to fill arrays on the device.
        with self.context.entered():
            arrays = [jax.device_put(np.zeros(s.shape, s.dtype), s.sharding) for s in specs]
        return jax.tree.unflatten(self.structure, arrays)


def signature_of(args: tuple[Any, ...]) -> Signature:
    """The signature of arguments, in the settings and mesh of this thread.

    Raises:
        TypeError: for a leaf that is no array.
        EsperError: under a transformation of jax.
    """
    context = _context_here()
    return Signature(*_types_of(args, _default_placement(context)), context)

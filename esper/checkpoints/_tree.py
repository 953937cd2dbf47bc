"""What a tree holds, leaf by leaf: names, types, and the arrays that are stored."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from esper.checkpoints._names import path_name
from esper.errors import CheckpointError

_PYTHON: dict[type, type] = {
    bool: np.bool_,
    int: np.int64,
    float: np.float64,
    complex: np.complex128,
}
"""Python's numbers, and what they are stored as."""
DTYPES = frozenset(
    {"bool", "int2", "int4", "int8", "int16", "int32", "int64"}
    | {"uint8", "uint16", "uint32", "uint64"}
    | {"float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn"}
    | {"float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"}
    | {"bfloat16", "float16", "float32", "float64", "complex64", "complex128"}
)
"""What tensorstore stores bit by bit."""
_KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
_HOLDS = "A checkpoint holds arrays, numpy's and Python's numbers, and keys of jax.random."


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What one leaf is."""

    type: str
    """A dtype's name, `key<implementation>`, or `Python int` and the like."""
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.type if self.type.startswith("Python ") else f"{self.type}{list(self.shape)}"

    @property
    def key_implementation(self) -> str | None:
        """The generator of a typed key, None for everything else."""
        if not self.type.startswith("key<"):
            return None
        return self.type.removeprefix("key<").removesuffix(">")

    @property
    def stored(self) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of the array that is stored for it."""
        implementation = self.key_implementation
        if implementation is not None:
            words = jax.eval_shape(
                lambda: jax.random.key_data(jax.random.key(0, impl=implementation))
            )
            return np.dtype(words.dtype), (*self.shape, *words.shape)
        for number, dtype in _PYTHON.items():
            if self.type == f"Python {number.__name__}":
                return np.dtype(dtype), ()
        return jax.numpy.dtype(self.type), self.shape

    @property
    def empty(self) -> bool:
        """Whether it holds no element, so that there is nothing to store."""
        return math.prod(self.shape) == 0


def is_key(leaf: Any) -> bool:
    """Whether an array, or the description of one, is of typed keys."""
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their names, in the tree's order.

    Raises:
        CheckpointError: for keys without a name, and where a class gives two leaves one name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in named:
            raise CheckpointError(
                f"two leaves of the tree have the name {name}: a class registered with jax gives"
                " both the same key; correct its flattening function"
            )
        named[name] = leaf
    return named


def _refused(name: str, what: str, advice: str) -> CheckpointError:
    return CheckpointError(f"the leaf {name} of the tree {what}. {advice}")


def leaf_spec(name: str, leaf: Any) -> LeafSpec:
    """What a leaf is; `jax.ShapeDtypeStruct`s stand for the arrays that they describe.

    Raises:
        CheckpointError: for what a checkpoint does not hold.
    """
    if type(leaf) in _PYTHON:
        return LeafSpec(f"Python {type(leaf).__name__}", ())
    kinds = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)
    if not isinstance(leaf, kinds) or isinstance(leaf, np.ma.MaskedArray):
        shown = repr(leaf) if isinstance(leaf, str) and len(leaf) < 40 else ""
        kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
        what = f"is a {kind} {shown}".rstrip()
        if type(leaf).__module__.partition(".")[0] == "torch":
            advice = "Give it as numpy: tensor.detach().cpu().numpy()."
        else:
            advice = (
                f"{_HOLDS} Leave functions and settings out, for instance by eqx.filter(tree,"
                " eqx.is_array), and put text into `meta`."
            )
        raise _refused(name, what, advice)
    if isinstance(leaf, Tracer):
        what = "is traced: it has no value inside jax.jit, jax.grad or jax.vmap"
        raise _refused(name, what, "Do this outside, with what it returns.")
    if not isinstance(leaf, np.ndarray | np.generic) and is_key(leaf):
        return LeafSpec(f"key<{_key_implementation(name, leaf)}>", tuple(leaf.shape))
    if leaf.dtype.name not in DTYPES or not leaf.dtype.isnative:
        what = f"has the dtype {leaf.dtype.str if leaf.dtype.kind != 'V' else leaf.dtype}"
        raise _refused(name, what, f"{_HOLDS} Cast it to one of their usual dtypes.")
    return LeafSpec(leaf.dtype.name, tuple(leaf.shape))


def _key_implementation(name: str, leaf: Any) -> str:
    if isinstance(leaf, jax.Array):
        implementation = jax.random.key_impl(leaf)
        if not isinstance(implementation, str):
            what = f"is a key of the unregistered implementation {implementation}"
            raise _refused(name, what, "Save its jax.random.key_data.")
        return implementation
    for known in _KEY_IMPLEMENTATIONS:
        if jax.eval_shape(lambda known=known: jax.random.key(0, impl=known)).dtype == leaf.dtype:
            return known
    return str(leaf.dtype).removeprefix("key<").removesuffix(">")


def stored_arrays(named: Mapping[str, Any]) -> dict[str, np.ndarray | jax.Array]:
    """The array that is stored for every leaf, but for those without elements.

    Raises:
        CheckpointError: for what a checkpoint does not hold.
    """
    arrays = {name: _stored_array(name, leaf) for name, leaf in named.items()}
    return {name: array for name, array in arrays.items() if array.size}


def _stored_array(name: str, leaf: Any) -> np.ndarray | jax.Array:
    leaf_spec(name, leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        what = f"is a description, {leaf}, and holds no values"
        raise _refused(name, what, "Save the arrays themselves.")
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            what = "was deleted: it was donated to a jitted function"
            raise _refused(name, what, "Save what that function returned in its place.")
        if not leaf.is_fully_addressable:
            what = "lies in part on devices of other processes"
            raise _refused(name, what, "Gather it first; checkpoints are written by one process.")
        return jax.random.key_data(leaf) if is_key(leaf) else leaf
    try:
        return np.asarray(leaf, _PYTHON.get(type(leaf)))
    except OverflowError:
        what = f"is the Python int {leaf}, which does not fit 64 bits"
        raise _refused(name, what, "Put it into `meta`.") from None


def tree_digest(tree: Any) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all leaves of a pytree.

    Containers count by the names that they give, and empty ones do not.

    Raises:
        CheckpointError: for what a checkpoint does not hold.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        array = np.asarray(_stored_array(name, leaf))
        implementation = leaf_spec(name, leaf).key_implementation
        # bfloat16 and its like are all the same to `dtype.str`.
        kind = array.dtype.str if array.dtype.kind != "V" else array.dtype.name
        kind = f"key<{implementation}>" if implementation else kind
        digest.update(f"{name}:{kind}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

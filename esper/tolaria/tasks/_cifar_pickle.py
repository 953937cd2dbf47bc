"""CIFAR-10's python files, read without unpickling.

They are pickles, and unpickling runs what the file says. These are read by a machine of our
own that knows the few operations which CIFAR's files are made of, makes nothing but numbers,
strings, lists, dictionaries and one array of bytes, and refuses the rest by name.
"""

import pickletools
from typing import Any, NamedTuple, TypeVar

import numpy as np

from esper.errors import InputError

_T = TypeVar("_T")
_MARK = object()
_MISSING = object()


class _Name(NamedTuple):
    """A global that the file names; it is never looked up."""

    name: str


class _Array:
    """An array in the making."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.data = b""


class _Dtype:
    """The dtype of bytes."""


_RECONSTRUCT = _Name("numpy.core.multiarray _reconstruct")
_NDARRAY = _Name("numpy ndarray")
_DTYPE = _Name("numpy dtype")
_NAMES = {own.name: own for own in (_RECONSTRUCT, _NDARRAY, _DTYPE)}

_IGNORED = {"PROTO"}
_VALUES = {
    "BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _RefusedError(Exception):
    """Something that CIFAR's files do not hold."""


class _Machine:
    """A stack, a memory, and the operations."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                return self.stack.pop()
            self._do(operation.name, argument)
        raise _RefusedError("no end")

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in _PUTS:
            self.memory[argument] = stack[-1]
        elif name in _GETS:
            stack.append(self.memory[argument])
        elif name in _TUPLES:
            self._tuple(_TUPLES[name])
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "APPEND":
            item = stack.pop()
            _typed(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = self._marked()
            _typed(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._marked() if name == "SETITEMS" else self._last(2))
        elif name == "GLOBAL":
            stack.append(self._global(argument))
        elif name == "REDUCE":
            self._reduce()
        elif name == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif name not in _IGNORED:
            raise _RefusedError(f"the operation {name}")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise _RefusedError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _tuple(self, count: int) -> None:
        self.stack.append(tuple(self._last(count)))

    def _marked(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _set_items(self, items: list[Any]) -> None:
        held = _typed(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            held[_typed(key, str)] = value

    def _global(self, name: str) -> _Name:
        if name not in _NAMES:
            raise _RefusedError(f"the name {name.replace(' ', '.')!r}")
        return _NAMES[name]

    def _reduce(self) -> None:
        called, arguments = self._last(2)
        if called == _RECONSTRUCT and arguments == (_NDARRAY, (0,), "b"):
            self.stack.append(_Array())
        elif called == _DTYPE and arguments == ("u1", 0, 1):
            self.stack.append(_Dtype())
        else:
            raise _RefusedError(f"a call of {called!r}")

    def _build(self, built: Any, state: Any) -> None:
        if isinstance(built, _Dtype):
            return
        match state:
            case (1, (int() as rows, int() as columns), _Dtype(), False, str() as text):
                array = _typed(built, _Array)
                # pickletools gives a string of bytes as one of Latin-1.
                array.shape, array.data = (rows, columns), text.encode("latin-1")
            case _:
                raise _RefusedError("an array of another kind than bytes in rows")


def _typed(value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise _RefusedError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def read_batch(data: bytes, name: str, records: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[records, 3072]` u8 and labels `[records]` u8 of one of CIFAR-10's python files.

    Raises:
        InputError: where it holds what those files do not, or is cut short.
    """
    try:
        held = _typed(_Machine().run(data), dict)
        array, labels = (held.get(key, _MISSING) for key in ("data", "labels"))
        array, labels = _typed(array, _Array), _typed(labels, list)
        if array.shape != (records, 3_072) or len(array.data) != records * 3_072:
            raise _RefusedError(f"{len(array.data)} bytes of images of the shape {array.shape}")
        if len(labels) != records or not all(type(v) is int and 0 <= v < 256 for v in labels):
            raise _RefusedError(f"{len(labels)} labels, or some that are no numbers")
    except _RefusedError as error:
        raise InputError(
            f"{name} holds {error}, which CIFAR-10's python files do not ({records} images of"
            " 3,072 bytes and as many labels, in a dictionary); nothing of it was run. Take"
            " the binary version, or the published archive"
        ) from error
    except (ValueError, IndexError, KeyError, UnicodeError, TypeError) as error:
        raise InputError(
            f"{name} is damaged or no pickle of CIFAR-10's ({error}); nothing of it was run. Fetch"
            " it again"
        ) from error
    return (
        np.frombuffer(array.data, np.uint8).reshape(array.shape),
        np.asarray(labels, np.uint8),
    )
